"""Choosing a chain: one replica for each stage, all layers covered once.  Pure."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Protocol

from shardmesh.errors import IncompleteError, InputError
from shardmesh.wire.peer_id import matching_peer


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
    n_parallel: int = 0  # sequences at once; 0: not known
    n_sessions: int = 0  # of them in use
    token_us: int = 0  # computing one token; 0: not known
    round_trips_us: tuple[tuple[str, int], ...] = ()  # to other nodes, by peer id


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


class Costs(Protocol):
    """What a chain costs: the sum over its stages, the hops between them and its turn."""

    def stage(self, replica: Replica) -> float: ...

    def hop(self, before: Replica, after: Replica) -> float:
        """From one stage to the next."""
        ...

    def turn(self, last: Replica, first: Replica) -> float:
        """From a chain's last stage to its first, with the token that it begins anew with."""
        ...


class _Free:
    def stage(self, replica: Replica) -> float:
        return 0.0

    def hop(self, before: Replica, after: Replica) -> float:
        return 0.0

    def turn(self, last: Replica, first: Replica) -> float:
        return 0.0


def chain_cost(stages: Sequence[Replica], costs: Costs) -> float:
    """Of one token, all the way round."""
    hops = sum(costs.hop(before, after) for before, after in itertools.pairwise(stages))
    return sum(map(costs.stage, stages)) + hops + costs.turn(stages[-1], stages[0])


def choose_chain(
    replicas: Iterable[Replica], *, model_name: str | None = None, costs: Costs | None = None
) -> Chain:
    """The cheapest chain.

    Raises InputError (theirs) for a model that nobody serves or that must be named, and
    IncompleteError (the moment's) that names the layers nobody serves.
    """
    models = _models_named(replicas, model_name)
    costs = costs or _Free()
    paths = {key: path for key, found in models.items() if (path := _cheapest(found, costs))}
    if not paths:
        raise _incomplete(max(models.values(), key=len))
    _require_one_name(paths)
    return Chain(min(paths.values(), key=lambda path: path[0])[1])


def pinned(
    replicas: Iterable[Replica], *, via: Sequence[str] = (), avoid: Sequence[str] = ()
) -> list[Replica]:
    """The replicas that a choice may take: those of `via` alone for their layers, none of `avoid`.

    Nodes are named by a peer id or its end.  Raises InputError (theirs) for one that is not there,
    or not a single one.
    """
    found = list(replicas)
    wanted = {_named(found, name) for name in via}
    unwanted = {_named(found, name) for name in avoid}
    fixed = [r for r in found if r.peer_id in wanted]
    return [
        r
        for r in found
        if r.peer_id not in unwanted
        and (
            r.peer_id in wanted
            or not any(f.layer_start < r.layer_end and r.layer_start < f.layer_end for f in fixed)
        )
    ]


def _named(replicas: Sequence[Replica], name: str) -> str:
    peer_ids = [replica.peer_id for replica in replicas]
    return matching_peer(name, peer_ids, one="node that serves", several="nodes that serve")


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
    replicas: Sequence[Replica], costs: Costs
) -> tuple[float, tuple[Replica, ...]] | None:
    """The cheapest way round: for each first stage the shortest path to each last one."""
    loaded = [replica for replica in replicas if replica.shard_loaded]
    loaded.sort(key=lambda r: (r.layer_start, r.layer_end, r.peer_id))
    hops = [
        [
            (number, costs.hop(before, after))
            for number, before in enumerate(loaded)
            if before.layer_end == after.layer_start
        ]
        for after in loaded
    ]
    own = [costs.stage(replica) for replica in loaded]
    rounds = []
    for number, first in enumerate(loaded):
        if first.layer_start == 0:
            paths = _paths_from(number, hops, own)
            rounds += [
                (cost + costs.turn(loaded[path[-1]], first), path)
                for cost, path in paths
                if loaded[path[-1]].layer_end == first.n_layer
            ]
    best = min(rounds, key=lambda way: way[0], default=None)
    return None if best is None else (best[0], tuple(loaded[number] for number in best[1]))


def _paths_from(
    first: int, hops: Sequence[Sequence[tuple[int, float]]], own: Sequence[float]
) -> Iterable[tuple[float, tuple[int, ...]]]:
    """The cheapest path from one node to each that can be reached; `hops` are those before each.

    Nodes are numbers, rising along any path.
    """
    paths: dict[int, tuple[float, tuple[int, ...]]] = {first: (own[first], (first,))}
    for number in range(first + 1, len(own)):
        ways = [(paths[n][0] + hop, paths[n][1]) for n, hop in hops[number] if n in paths]
        if ways:
            cost, path = min(ways, key=lambda way: way[0])
            paths[number] = (cost + own[number], (*path, number))
    return paths.values()


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
