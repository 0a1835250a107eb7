"""Numbers on the command line."""

from __future__ import annotations

import math
import re
from typing import Any, Final

import click

PORT: Final = click.IntRange(0, 65535)
"""A TCP port; 0 is any."""

COUNT_MAX: Final = 2**31 - 1
"""What the wire takes as a count."""

SECONDS_MAX: Final = 1_000_000.0
"""Twelve days; the system's own waits cannot be told of much more."""

_SIZE: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([KMGT]?)(?:I?B)?", re.IGNORECASE)
_POWER: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def bytes_of(text: str) -> int | None:
    """A size like 500M or 2G in bytes; K, M, G and T are powers of 1024.  None if it is none."""
    match = _SIZE.fullmatch(text.strip())
    return None if match is None else int(float(match[1]) * 1024 ** _POWER[match[2].upper()])


class FiniteRange(click.FloatRange):
    """A FloatRange that takes neither `nan`, which is in every range of click's, nor `inf`."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no number to count with", param, ctx)
        return number
