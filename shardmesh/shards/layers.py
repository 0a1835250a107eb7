"""Layer ranges: half-open, ordered, never empty."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from shardmesh.errors import InputError


@dataclasses.dataclass(frozen=True, order=True)
class LayerRange:
    """Layers `layer_start` to `layer_end - 1`; raises InputError (theirs) when empty."""

    layer_start: int
    layer_end: int

    def __post_init__(self) -> None:
        if not 0 <= self.layer_start < self.layer_end:
            raise InputError(f"{self} is not a range of layers", code="BAD_LAYERS")

    @property
    def n_layer(self) -> int:
        return self.layer_end - self.layer_start

    def __contains__(self, layer: int) -> bool:
        return self.layer_start <= layer < self.layer_end

    def __str__(self) -> str:
        return f"[{self.layer_start}, {self.layer_end})"


def ranges_of_counts(counts: Sequence[int]) -> tuple[LayerRange, ...]:
    """Consecutive ranges of so many layers each, from layer 0."""
    ends = itertools.accumulate(counts)
    return tuple(LayerRange(end - n, end) for n, end in zip(counts, ends, strict=True))


def check_cover(ranges: Sequence[LayerRange], n_layer: int) -> None:
    """Raises InputError (theirs) unless the ranges, in order, hold every layer exactly once."""
    expected = 0
    for layers in ranges:
        if layers.layer_start != expected:
            raise InputError(
                f"layer range {layers} does not follow on layer {expected}", code="BAD_LAYERS"
            )
        expected = layers.layer_end
    if expected != n_layer:
        raise InputError(
            f"the layer ranges end at {expected}, but the model has {n_layer} layers",
            code="BAD_LAYERS",
            next_step=f"give ranges that add up to {n_layer}",
        )
