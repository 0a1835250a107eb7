"""Which shard gets which layers: pure decisions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final

from shardmesh.errors import InputError
from shardmesh.shards.costs import ModelCosts
from shardmesh.shards.layers import LayerRange, ranges_of_counts
from shardmesh.shards.legal_cuts import ANYWHERE, LegalCuts, too_many_shards

_BISECTIONS: Final = 60

Load = Callable[[int, LayerRange], float]
"""How much a range weighs on a shard; never less for a longer range with the same start."""


def plan_shards(costs: ModelCosts, n_shards: int) -> tuple[LayerRange, ...]:
    """Legal ranges whose largest file is as small as can be, the others as even as can be.

    Raises InputError (theirs) for no shard, or more shards than can be.
    """
    _check_n_shards(costs.n_layer, n_shards)

    def load(_: int, layers: LayerRange) -> float:
        return costs.file_bytes(layers)

    bound = _smallest_legal_bound(costs.legal, n_shards, load)
    return _balanced(costs.n_layer, n_shards, load, bound, costs.legal)


def plan_layers(n_layer: int, counts: Sequence[int]) -> tuple[LayerRange, ...]:
    """Ranges of the given numbers of layers; raises InputError (theirs) if they do not add up."""
    if not counts or min(counts) < 1 or sum(counts) != n_layer:
        wrong = (
            "has a shard without layers"
            if sum(counts) == n_layer
            else f"adds up to {sum(counts)}, but the model has {n_layer} layers"
        )
        raise InputError(
            f"the layer list {','.join(map(str, counts))} {wrong}",
            code="BAD_LAYERS",
            next_step=f"give numbers from 1 on that add up to {n_layer}",
        )
    return ranges_of_counts(counts)


def plan_memory(
    costs: ModelCosts, memory_bytes: Sequence[int], n_ctx: int
) -> tuple[LayerRange, ...]:
    """One range for each machine, in order, each as full in proportion as the others.

    `n_ctx` tokens in all are cached on each.  Raises InputError (theirs) when it does not fit.
    """
    _check_n_shards(costs.n_layer, len(memory_bytes))

    def load(machine: int, layers: LayerRange) -> float:
        return costs.memory_bytes(layers, n_ctx) / max(memory_bytes[machine], 1)

    n_shards = len(memory_bytes)
    bound = _smallest_legal_bound(costs.legal, n_shards, load)
    if bound is None and _fill(costs.n_layer, n_shards, load, 1.0) is not None:
        bound = 1.0
    if bound is None or bound > 1.0:
        raise _does_not_fit(costs, memory_bytes, n_ctx)
    return _balanced(costs.n_layer, n_shards, load, bound, costs.legal)


def memory_needed(costs: ModelCosts, ranges: Sequence[LayerRange], n_ctx: int) -> tuple[int, ...]:
    """Bytes of memory for each shard's listener with `n_ctx` cached tokens."""
    return tuple(costs.memory_bytes(layers, n_ctx) for layers in ranges)


def readable_size(n_bytes: int) -> str:
    """Bytes for a person: GiB, or MiB below one of them."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def _balanced(
    n_layer: int,
    n_shards: int,
    load: Load,
    bound: float | None = None,
    cuts: LegalCuts = ANYWHERE,
) -> tuple[LayerRange, ...]:
    """The cut with the smallest largest load and, among those, the smallest sum of squares.

    `bound` is a largest load that is known to be possible, and the smallest if cuts are legal
    only at some places.
    """
    if bound is None:
        bound = max(load(shard, LayerRange(0, n_layer)) for shard in range(n_shards))
    if cuts.is_anywhere:
        bound = _smallest_bound(n_layer, n_shards, load, bound)
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # end: squares, all ends
    for shard in range(n_shards):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        last_end = n_layer - (n_shards - 1 - shard)  # a layer is left for each shard behind
        for start, (squares, ends) in best.items():
            for end in range(start + 1, last_end + 1):
                weight = load(shard, LayerRange(start, end))
                if weight > bound:
                    break
                if not cuts.allows(LayerRange(start, end)):
                    continue
                candidate = (squares + weight * weight, (*ends, end))
                if end not in longer or candidate < longer[end]:
                    longer[end] = candidate
        best = longer
    return _ranges(best[n_layer][1])


def _smallest_bound(n_layer: int, n_shards: int, load: Load, possible: float) -> float:
    """The smallest load that no shard need exceed, to within rounding; always a possible one."""
    impossible = 0.0
    for _ in range(_BISECTIONS):
        middle = (impossible + possible) / 2
        if _fill(n_layer, n_shards, load, middle) is None:
            impossible = middle
        else:
            possible = middle
    return possible


def _smallest_legal_bound(cuts: LegalCuts, n_shards: int, load: Load) -> float | None:
    """The smallest load that no shard need exceed; None if a cut is legal anywhere.

    Raises InputError (theirs) if there is no legal cut into so many.
    """
    if cuts.is_anywhere:
        return None
    best = {0: 0.0}  # end: largest load of the shards up to there
    for shard in range(n_shards):
        longer: dict[int, float] = {}
        for start, largest in best.items():
            for end in range(start + 1, cuts.n_layer + 1):
                layers = LayerRange(start, end)
                if cuts.allows(layers):
                    candidate = max(largest, load(shard, layers))
                    longer[end] = min(candidate, longer.get(end, candidate))
        best = longer
    if cuts.n_layer not in best:
        raise too_many_shards(n_shards)
    return best[cuts.n_layer]


def _fill(n_layer: int, n_shards: int, load: Load, bound: float) -> tuple[LayerRange, ...] | None:
    """Fills one shard after the other up to the bound; None if that leaves layers over.

    To take as many as fit is never wrong: fewer would only leave more for those behind.
    """
    ends: list[int] = []
    start = 0
    for shard in range(n_shards):
        last_end = n_layer - (n_shards - 1 - shard)
        end = start
        while end < last_end and load(shard, LayerRange(start, end + 1)) <= bound:
            end += 1
        if end == start:
            return None
        ends.append(end)
        start = end
    return _ranges(ends) if start == n_layer else None


def _ranges(ends: Sequence[int]) -> tuple[LayerRange, ...]:
    return tuple(LayerRange(start, end) for start, end in itertools.pairwise((0, *ends)))


def _check_n_shards(n_layer: int, n_shards: int) -> None:
    if not 1 <= n_shards <= n_layer:
        raise InputError(
            f"a model of {n_layer} layers cannot be cut into {n_shards} shards",
            code="BAD_LAYERS",
            next_step=f"ask for 1 to {n_layer} shards",
        )


def _does_not_fit(costs: ModelCosts, memory_bytes: Sequence[int], n_ctx: int) -> InputError:
    """Says which machine is too small for any layer, or else what is missing in all."""
    n_machines = len(memory_bytes)
    for machine, n_bytes in enumerate(memory_bytes):
        layer = costs.n_layer - 1 if machine == n_machines - 1 else machine
        needed = costs.memory_bytes(LayerRange(layer, layer + 1), n_ctx)
        if needed > n_bytes:
            detail = (
                f"machine {machine + 1} has {readable_size(n_bytes)}, but even one layer"
                f" with {n_ctx} cached tokens needs {readable_size(needed)} there"
            )
            break
    else:
        even = _balanced(
            costs.n_layer, n_machines, lambda _, layers: costs.memory_bytes(layers, n_ctx)
        )
        needed = sum(memory_needed(costs, even, n_ctx))
        detail = (
            f"with {n_ctx} cached tokens it needs about {readable_size(needed)},"
            f" in whole layers, the machines have {readable_size(sum(memory_bytes))}"
        )
    return InputError(
        f"the model does not fit: {detail}",
        code="NO_MEMORY",
        next_step="add machines or memory, lower --ctx-size or --parallel, or take a smaller "
        "quantisation",
    )
