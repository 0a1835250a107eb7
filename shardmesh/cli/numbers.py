"""Numbers on the command line."""

from __future__ import annotations

import math
from typing import Any, Final

import click

COUNT_MAX: Final = 2**31 - 1
"""What the wire takes as a count."""

SECONDS_MAX: Final = 1_000_000.0
"""Twelve days; the system's own waits cannot be told of much more."""


class FiniteRange(click.FloatRange):
    """A FloatRange that takes neither `nan`, which is in every range of click's, nor `inf`."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number to count with", param, ctx)
        return number
