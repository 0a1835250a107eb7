"""A sequence's bits do not depend on what other sequences do, nor on how work is handed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.models import write_model

from shardmesh.engine.base import Engine, EngineOptions, MicroBatch, SamplingSettings
from shardmesh.engine.llama import load_engine

PROMPT = tuple(range(30, 70))
OTHERS = tuple(range(100, 200))
Disturb = Callable[[Engine, int, MicroBatch], np.ndarray]


def alone(engine: Engine, step: int, micro: MicroBatch) -> np.ndarray:
    return _logits(engine.compute([micro])[0])


def between(engine: Engine, step: int, micro: MicroBatch) -> np.ndarray:
    engine.compute([_other(1, step), _other(3, step)])
    return _logits(engine.compute([micro])[0])


def together(engine: Engine, step: int, micro: MicroBatch) -> np.ndarray:
    return _logits(engine.compute([_other(1, step), micro, _other(3, step)])[1])


def _other(sequence: int, step: int) -> MicroBatch:
    return MicroBatch(sequence=sequence, position=step, tokens=(OTHERS[step],))


def _logits(output) -> np.ndarray:  # type: ignore[no-untyped-def]
    assert output.logits is not None
    return output.logits


def logits_of(path: Path, disturb: Disturb, flash_attention: bool) -> bytes:
    options = EngineOptions(n_ctx=256, n_parallel=4, n_threads=1, flash_attention=flash_attention)
    engine = load_engine(path, options)
    try:
        for sequence in range(4):
            engine.open_sequence(sequence, SamplingSettings(temperature=0.0))
        if disturb is not alone:
            engine.compute([MicroBatch(sequence=2, position=0, tokens=OTHERS[:13])])
        engine.compute([MicroBatch(sequence=0, position=0, tokens=PROMPT[:20])])
        rows = [
            disturb(
                engine,
                step,
                MicroBatch(
                    sequence=0, position=20 + step, tokens=(PROMPT[20 + step],), want_logits=True
                ),
            )
            for step in range(20)
        ]
        return np.stack(rows).tobytes()
    finally:
        engine.close()


@pytest.mark.parametrize("flash_attention", [False, True])
@pytest.mark.parametrize("weights", ["f32", "f16", "q8_0", "q4_k"])
def test_other_sequences_change_no_bit(tmp_path: Path, weights: str, flash_attention: bool) -> None:
    path = write_model(
        tmp_path / "m.gguf", "llama", n_layer=2, weights=weights, vocabulary="built-in", n_embd=256
    )
    expected = logits_of(path, alone, flash_attention)
    assert logits_of(path, between, flash_attention) == expected
    assert logits_of(path, together, flash_attention) == expected
