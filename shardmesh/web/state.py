"""The state document that the console shows, and what changed in it.  Pure.

A document is a tree of JSON objects by id.  A change is a merge patch (RFC 7396): what it names
is put in place of the old, null takes a member away, arrays are replaced whole.  So a document
itself never holds null.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from shardmesh.web.roster import Node, Roster, gaps

Json = dict[str, Any]


def state_document(
    roster: Roster, *, gateway: Json, sessions: Mapping[str, Json], links: Mapping[str, str]
) -> Json:
    """Everything that the console shows, but the events and the chat.

    `links` are those of published models, by manifest digest.

    `needed` is the shard that a further listener should take; absent while no model is known.
    """
    models = models_json(roster)
    for digest in models.keys() & links.keys():
        models[digest]["link"] = links[digest]
    document: Json = {
        "gateway": gateway,
        "models": models,
        "nodes": nodes_json(roster),
        "sessions": dict(sessions),
    }
    if (needed := needed_shard(models)) is not None:
        document["needed"] = needed
    return document


def nodes_json(roster: Roster) -> dict[str, Json]:
    """All nodes; names that several have are marked, so that the page tells them apart."""
    names = Counter(node.name for node in roster.values() if node.name)
    return {
        peer_id: node.json | ({"name_clash": True} if names[node.name] > 1 else {})
        for peer_id, node in roster.items()
    }


def models_json(roster: Roster) -> dict[str, Json]:
    """The models of the mesh by manifest digest, each with its shards and how often they are
    served."""
    models: dict[str, Json] = {}
    for (name, digest), missing in sorted(gaps(roster).items()):
        nodes = [n for n in roster.values() if n.announcement.manifest_digest == digest]
        first = nodes[0].announcement
        fingerprints = {n.announcement.engine_fingerprint for n in nodes if n.serves}
        models[digest] = {
            "name": name,
            "n_layer": first.total_layers,
            "total_shards": first.total_shards,
            "missing": [list(gap) for gap in missing],
            "complete": not missing,
            "exact": len(fingerprints) <= 1,
            "shards": _shards_json(nodes),
        }
    return models


def _shards_json(nodes: list[Node]) -> dict[str, Json]:
    shards: dict[str, Json] = {}
    for node in nodes:
        a = node.announcement
        shard = shards.setdefault(str(a.shard_id), {"n_serving": 0})
        if a.layer_end > a.layer_start:
            shard |= {"layer_start": a.layer_start, "layer_end": a.layer_end}
        shard["n_serving"] += node.serves
    return shards


def needed_shard(models: Mapping[str, Json]) -> Json | None:
    """The shard with the fewest replicas, one that nobody has first; ties go to the lower id."""
    best: tuple[tuple[int, str, int], Json] | None = None
    for digest, model in models.items():
        for shard_id in range(model["total_shards"]):
            shard = model["shards"].get(str(shard_id), {"n_serving": 0})
            rank = (shard["n_serving"], digest, shard_id)
            if best is None or rank < best[0]:
                layers = {k: shard[k] for k in ("layer_start", "layer_end") if k in shard}
                best = (
                    rank,
                    {
                        "model": digest,
                        "shard_id": shard_id,
                        "n_serving": shard["n_serving"],
                        **layers,
                    },
                )
    return best[1] if best is not None else None


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Json:
    """The merge patch that makes `after` of `before`; empty if they are equal."""
    patch: Json = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if key not in before:
            patch[key] = value
        elif isinstance(old, dict) and isinstance(value, dict):
            if inner := changes(old, value):
                patch[key] = inner
        elif old != value:
            patch[key] = value
    return patch


def merged(document: Mapping[str, Any], patch: Mapping[str, Any]) -> Json:
    """The document after a merge patch."""
    result = dict(document)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            old = result.get(key)
            result[key] = merged(old if isinstance(old, dict) else {}, value)
        else:
            result[key] = value
    return result
