"""The command knows all benchmarks without loading them."""

from __future__ import annotations

from benchmarks.catalogue import BENCHMARKS, BY_RPC
from benchmarks.command import NAMES
from benchmarks.rpc import WORKS


def test_the_command_offers_every_benchmark() -> None:
    assert list(BENCHMARKS) == list(NAMES)
    assert set(BY_RPC) == set(WORKS) <= set(NAMES)
