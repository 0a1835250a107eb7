"""Which shard a node serves: flags and manifest held against each other.  Pure."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable

from shardmesh.errors import InputError
from shardmesh.shards.manifest import Manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedShard:
    """What flags and variables say; None for what they leave open."""

    shard_id: int | None = None
    total_shards: int | None = None
    total_layers: int | None = None
    model_name: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a node is to serve, as far as it is known."""

    shard_id: int
    total_shards: int
    total_layers: int
    layer_start: int
    layer_end: int
    model_name: str
    manifest_digest: str


def assign(wanted: WantedShard, shard_id: int, manifest: Manifest | None) -> Assignment:
    """The assignment of a node to a shard.

    Without a manifest the node joins with what the flags say and an empty layer range.  Raises
    InputError (theirs) for a contradiction, which it names with both values.
    """
    if manifest is None:
        total_shards = wanted.total_shards or shard_id + 1
        _check_shard_id(shard_id, total_shards)
        return Assignment(
            shard_id=shard_id,
            total_shards=total_shards,
            total_layers=wanted.total_layers or 0,
            layer_start=0,
            layer_end=0,
            model_name=wanted.model_name or "",
            manifest_digest="",
        )
    _check_same("--total-shards", wanted.total_shards, len(manifest.shards))
    _check_same("--total-layers", wanted.total_layers, manifest.n_layer)
    _check_same("--model-name", wanted.model_name, manifest.model_name)
    _check_shard_id(shard_id, len(manifest.shards))
    entry = manifest.shards[shard_id]
    return Assignment(
        shard_id=shard_id,
        total_shards=len(manifest.shards),
        total_layers=manifest.n_layer,
        layer_start=entry.layer_start,
        layer_end=entry.layer_end,
        model_name=manifest.model_name,
        manifest_digest=manifest.digest(),
    )


def least_served(
    total_shards: int, served: Iterable[int], here: Collection[int] = frozenset()
) -> int:
    """The shard with the fewest replicas; of equals one whose file is `here`, then the lowest.

    `served` has one entry for each replica.  Raises InputError (theirs) when the number of shards
    is not known.
    """
    if total_shards < 1:
        raise InputError(
            "nobody says how many shards the model has",
            code="NO_SHARD_ID",
            next_step="give --shard-id, or put the split's manifest.json into --shards-dir",
        )
    n_replicas = Counter(served)
    return min(range(total_shards), key=lambda i: (n_replicas[i], i not in here, i))


def _check_same(flag: str, given: int | str | None, known: int | str) -> None:
    if given is not None and given != known:
        raise InputError(
            f"{flag} says {given}, the manifest says {known}",
            code="CONTRADICTION",
            next_step=f"leave {flag} out, or use the shards of the other split",
        )


def _check_shard_id(shard_id: int, total_shards: int) -> None:
    if not 0 <= shard_id < total_shards:
        raise InputError(
            f"there is no shard {shard_id}: the model has {total_shards}, numbered from 0",
            code="NO_SUCH_SHARD",
            next_step=f"give a --shard-id from 0 to {total_shards - 1}",
        )
