"""Choosing a chain: one replica for each stage, all layers covered once.  Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from shardmesh.errors import IncompleteError, InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replica:
    """One listener as the chooser sees it."""

    peer_id: str
    addresses: tuple[str, ...]
    model_name: str
    manifest_digest: str
    shard_id: int
    layer_start: int
    layer_end: int
    n_layer: int  # of the whole model
    n_ctx: int
    shard_loaded: bool
    fingerprint: str
    sequence: int = 0  # of its announcement; higher is newer


@dataclasses.dataclass(frozen=True)
class Chain:
    """Replicas in order of their layers; never empty."""

    stages: tuple[Replica, ...]

    @property
    def n_ctx(self) -> int:
        """Tokens that every stage can hold."""
        return min(stage.n_ctx for stage in self.stages)


def models_of(replicas: Iterable[Replica]) -> dict[tuple[str, str], list[Replica]]:
    """Replicas by (model name, manifest digest): only equal digests fit together."""
    models: dict[tuple[str, str], list[Replica]] = {}
    for replica in replicas:
        models.setdefault((replica.model_name, replica.manifest_digest), []).append(replica)
    return models


def missing_layers(replicas: Sequence[Replica]) -> list[tuple[int, int]]:
    """Half-open layer ranges that no loaded replica of this model serves."""
    if not replicas:
        return []
    missing, reached = [], 0
    for replica in sorted(replicas, key=lambda r: r.layer_start):
        if not replica.shard_loaded:
            continue
        if replica.layer_start > reached:
            missing.append((reached, replica.layer_start))
        reached = max(reached, replica.layer_end)
    if reached < replicas[0].n_layer:
        missing.append((reached, replicas[0].n_layer))
    return missing


def choose_chain(
    replicas: Iterable[Replica],
    *,
    model_name: str | None = None,
    cost: Mapping[str, float] | None = None,
) -> Chain:
    """The cheapest chain, `cost` (peer id -> anything comparable) summed over its stages.

    Raises InputError (theirs) for a model that nobody serves or that must be named, and
    IncompleteError (the moment's) that names the layers nobody serves.
    """
    models = _models_named(replicas, model_name)
    paths = {key: path for key, found in models.items() if (path := _cheapest(found, cost or {}))}
    if not paths:
        raise _incomplete(max(models.values(), key=len))
    _require_one_name(paths)
    return Chain(min(paths.values(), key=lambda path: path[0])[1])


def choose_model(replicas: Iterable[Replica], model_name: str | None) -> list[Replica]:
    """The replicas of one split of a model, of several the one that most serve; never empty.

    Raises as `choose_chain` does, except that layers may be missing.
    """
    models = _models_named(replicas, model_name)
    _require_one_name(models)
    return max(models.values(), key=len)


def _models_named(
    replicas: Iterable[Replica], model_name: str | None
) -> dict[tuple[str, str], list[Replica]]:
    """Those of this name, or all; raises if there is none."""
    # A node that waits for its shard may not know of a model yet: it has no layers.
    models = models_of(replica for replica in replicas if replica.n_layer > 0)
    if model_name is not None:
        models = {key: found for key, found in models.items() if key[0] == model_name}
    if not models:
        raise _nobody(model_name)
    return models


def _require_one_name(models: Iterable[tuple[str, str]]) -> None:
    names = sorted({name for name, _ in models})
    if len(names) > 1:
        raise InputError(
            f"the mesh serves several models: {', '.join(names)}",
            code="MODEL_NOT_NAMED",
            next_step="choose one with --model",
        )


def _cheapest(
    replicas: Sequence[Replica], cost: Mapping[str, float]
) -> tuple[float, tuple[Replica, ...]] | None:
    """Shortest path from layer 0 to the last, one edge a replica: its cost and its replicas."""
    n_layer = replicas[0].n_layer
    best: dict[int, tuple[float, tuple[Replica, ...]]] = {0: (0.0, ())}
    for replica in sorted(replicas, key=lambda r: (r.layer_start, r.layer_end, r.peer_id)):
        if not replica.shard_loaded or replica.layer_start not in best:
            continue
        before, stages = best[replica.layer_start]
        total = before + cost.get(replica.peer_id, 0.0)
        if replica.layer_end not in best or total < best[replica.layer_end][0]:
            best[replica.layer_end] = (total, (*stages, replica))
    return best.get(n_layer)


def _nobody(model_name: str | None) -> IncompleteError | InputError:
    if model_name is None:
        return IncompleteError(
            "nobody in this mesh serves a model",
            code="EMPTY_MESH",
            next_step="start listeners with `shardmesh listen`, or check --bootstrap and --cluster",
        )
    return InputError(
        f"nobody in this mesh serves a model named {model_name}",
        code="UNKNOWN_MODEL",
        next_step="`shardmesh status` lists the models that are served",
    )


def _incomplete(replicas: Sequence[Replica]) -> IncompleteError:
    missing = missing_layers(replicas)
    ranges = ", ".join(f"[{start}, {end})" for start, end in missing)
    if not missing:
        return IncompleteError(
            "the shards that are served do not join without overlap",
            next_step="serve shards of one split only",
        )
    return IncompleteError(
        f"nobody serves the layers {ranges} of {replicas[0].model_name}",
        next_step="start a listener for the missing shard, or wait until it has loaded",
    )
