"""What holds if nothing is said."""

from __future__ import annotations

from typing import Final

DEFAULT_BOOTSTRAP: Final = "/ip4/127.0.0.1/tcp/51820"
"""A bootstrap on the same machine; if none was named, the LAN is searched too."""

NICE_DEFAULT: Final = 5
"""How far computing stands back behind a machine's other work.

A gateway on the same two cores took 8.8 ms instead of 13.2 for the slowest of a hundred short
answers while eight texts were streamed; a text alone was written as fast (docs/performance.md).
"""
