"""Where a model may be cut: computed from its metadata and the rules of its architecture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final

from shardmesh.errors import InputError
from shardmesh.shards.architectures import rules_for
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.layers import LayerRange, ranges_of_counts
from shardmesh.shards.patterns import (
    attention_layers,
    compressed_layers,
    own_indexers,
    recurrent_layers,
    token_layers,
    windowed_layers,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LegalCuts:
    """Which ranges of layers may be shards."""

    n_layer: int
    step: int = 1  # a shard starts only at multiples of it
    needed: tuple[tuple[bool, ...], ...] = ()  # of each kind of layer: a shard has at least one
    starts: tuple[bool, ...] = ()  # empty: all; layers that do not lean on the one before
    n_with_tokens: int = 0  # the last layer that looks tokens up, and all before, are in the first
    special_counts: frozenset[int] = frozenset()  # lengths that llama.cpp treats as another model

    @property
    def is_anywhere(self) -> bool:
        limits = (self.needed, self.starts, self.n_with_tokens, self.special_counts)
        return self.step == 1 and not any(limits)

    def allows(self, layers: LayerRange) -> bool:
        """Whether a range may be a shard; the whole model always is one."""
        start, end = layers.layer_start, layers.layer_end
        if (start, end) == (0, self.n_layer):
            return True
        return (
            start % self.step == 0
            and (not self.starts or self.starts[start])
            and (start == 0 or start >= self.n_with_tokens)
            and (end % self.step == 0 or end == self.n_layer)
            and layers.n_layer not in self.special_counts
            and all(any(kind[start:end]) for kind in self.needed)
        )

    def of_first(self, n_layer: int) -> LegalCuts:
        """Those of the first layers, taken as a model of their own."""
        needed = tuple(kind[:n_layer] for kind in self.needed)
        return dataclasses.replace(
            self, n_layer=n_layer, needed=needed, starts=self.starts[:n_layer]
        )

    def nearest(self, ranges: Sequence[LayerRange]) -> tuple[LayerRange, ...] | None:
        """The legal ranges of the same number whose ends are nearest to these; None without any."""
        best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
        for wanted in ranges:
            longer: dict[int, tuple[int, tuple[int, ...]]] = {}
            for start, (distance, counts) in best.items():
                for end in range(start + 1, self.n_layer + 1):
                    if self.allows(LayerRange(start, end)):
                        moved = distance + abs(end - wanted.layer_end)
                        candidate = (moved, (*counts, end - start))
                        if end not in longer or candidate < longer[end]:
                            longer[end] = candidate
            best = longer
        return ranges_of_counts(best[self.n_layer][1]) if self.n_layer in best else None


ANYWHERE: Final = LegalCuts(n_layer=0)
"""No rule: `n_layer` does not matter then."""


def legal_cuts(model: GgufFile) -> LegalCuts:
    """The legal cuts of a model; raises GgufError (theirs) if its architecture has none."""
    rules = rules_for(model)
    step = rules.step
    if rules.step_key:
        step = math.lcm(step, max(1, model.get_int(f"{model.architecture}.{rules.step_key}", 1)))
    needed = []
    windowed = windowed_layers(model)
    if rules.window_everywhere and any(windowed):
        needed.append(windowed)
    if rules.full_everywhere and not all(windowed):
        needed.append(tuple(not each for each in windowed))
    if rules.whole_step_everywhere:
        needed.append(tuple((layer + 1) % rules.step == 0 for layer in range(model.n_layer)))
    if rules.compressed_everywhere:
        needed += compressed_layers(model)
    if rules.recurrent:
        needed += [recurrent_layers(model), attention_layers(model)]
    with_tokens = token_layers(model)
    return LegalCuts(
        n_layer=model.n_layer,
        step=step,
        n_with_tokens=max((n for n, looks in enumerate(with_tokens, start=1) if looks), default=0),
        needed=tuple(needed),
        starts=own_indexers(model),
        special_counts=frozenset()
        if model.n_layer in rules.special_layer_counts
        else rules.special_layer_counts,
    )


def legal_boundaries(model: GgufFile) -> tuple[int, ...]:
    """The layers before which a model may be cut in two; raises GgufError (theirs)."""
    cuts, n_layer = legal_cuts(model), model.n_layer
    return tuple(
        layer
        for layer in range(1, n_layer)
        if cuts.allows(LayerRange(0, layer)) and cuts.allows(LayerRange(layer, n_layer))
    )


def check_legal(cuts: LegalCuts, ranges: Sequence[LayerRange]) -> None:
    """Raises InputError (theirs) with the nearest legal list unless all ranges may be shards."""
    wrong = [layers for layers in ranges if not cuts.allows(layers)]
    if not wrong:
        return
    nearest = cuts.nearest(ranges)
    raise InputError(
        f"layers {wrong[0]} cannot be a shard of this model: {_reason(cuts, wrong[0])}",
        code="BAD_LAYERS",
        next_step=f"use --layers {','.join(str(layers.n_layer) for layers in nearest)}"
        if nearest
        else f"use fewer shards than {len(ranges)}",
    )


def too_many_shards(n_shards: int) -> InputError:
    """When no legal cut has so many shards."""
    return InputError(
        f"this model cannot be cut into {n_shards} shards: what repeats in its layers must be whole"
        " in each",
        code="BAD_LAYERS",
        next_step="ask for fewer shards",
    )


def _reason(cuts: LegalCuts, layers: LayerRange) -> str:
    for boundary in (layers.layer_start, layers.layer_end):
        if boundary % cuts.step and boundary != cuts.n_layer:
            return f"its layers repeat in steps of {cuts.step}"
    if cuts.starts and not cuts.starts[layers.layer_start]:
        return f"layer {layers.layer_start} uses what the layer before it chose"
    if 0 < layers.layer_start < cuts.n_with_tokens:
        return f"the first {cuts.n_with_tokens} layers need the tokens themselves"
    if layers.n_layer in cuts.special_counts:
        return f"llama.cpp takes {layers.n_layer} layers for another model of this family"
    return "each shard needs at least one layer of each kind"
