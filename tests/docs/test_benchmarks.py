"""The command knows all benchmarks without loading them."""

from __future__ import annotations

import pytest

from benchmarks.catalogue import BENCHMARKS, BY_RPC
from benchmarks.command import NAMES
from benchmarks.pieces import chain_s, speed_up
from benchmarks.rpc import WORKS


@pytest.mark.parametrize("n_stages", [1, 2, 5])
@pytest.mark.parametrize("n_pieces", [1, 3, 64])
def test_equal_pieces_fill_a_chain_one_after_the_other(n_stages: int, n_pieces: int) -> None:
    assert chain_s([0.5] * n_pieces, n_stages) == 0.5 * (n_pieces + n_stages - 1)


def test_a_stage_waits_for_the_one_before_and_for_itself() -> None:
    assert chain_s([1.0, 3.0, 1.0], 2) == 1 + 3 + 3 + 1
    assert chain_s([3.0, 1.0, 1.0], 2) == 3 + 3 + 1 + 1
    assert speed_up([1.0, 1.0], 2.0, 2) == 4 / 3
    assert speed_up([2.0], 2.0, 4) == 1.0


def test_the_command_offers_every_benchmark() -> None:
    assert list(BENCHMARKS) == list(NAMES)
    assert set(BY_RPC) == set(WORKS) <= set(NAMES)
