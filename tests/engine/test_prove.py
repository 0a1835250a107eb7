"""Architectures that are not in the table: tried before they are believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.models import BUILT_IN, write_model
from support.rule_models import write_rule_model

from shardmesh.engine.prove import N_PREFILL_MAX, N_PREFILL_MIN, prefill_length, prove_exact
from shardmesh.engine.verify_worker import VerifyTask
from shardmesh.errors import EngineError, GgufError
from shardmesh.shards import architectures
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.gguf_values import string, uint32, uint32s
from shardmesh.shards.layers import ranges_of_counts

RANGES = ranges_of_counts([3, 2, 3])


def forget(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    rules = {name: each for name, each in architectures.RULES.items() if name != architecture}
    monkeypatch.setattr(architectures, "RULES", rules)


@pytest.mark.slow
@pytest.mark.parametrize("n_bytes_free", [None, 1_800_000], ids=["all of it", "its first layers"])
def test_a_model_that_stays_exact_is_believed(
    n_bytes_free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m.gguf", "llama", n_layer=8, vocabulary=BUILT_IN)
    forget(monkeypatch, "llama")
    lines: list[str] = []
    prove_exact(read_gguf(model), RANGES, progress=lines.append, n_bytes_free=n_bytes_free)
    assert any("first" in line for line in lines) == (n_bytes_free is not None)


@pytest.mark.slow
def test_a_model_that_does_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_rule_model(tmp_path / "m.gguf", "granite")
    forget(monkeypatch, "granite")
    with pytest.raises(GgufError, match="the logits differ") as caught:
        prove_exact(read_gguf(model), RANGES, progress=lambda _: None)
    assert caught.value.code == "GGUF_ARCHITECTURE"


def test_a_process_that_dies_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m.gguf", "llama", n_layer=8, vocabulary=BUILT_IN)
    forget(monkeypatch, "llama")

    def die(task: VerifyTask, what: str, timeout_s: float) -> None:
        raise EngineError(f"{what}: its process died inside llama.cpp (SIGFPE)")

    with pytest.raises(GgufError, match="SIGFPE"):
        prove_exact(read_gguf(model), RANGES, progress=lambda _: None, run=die)


def test_without_memory_for_any_part_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m.gguf", "llama", n_layer=8, vocabulary=BUILT_IN)
    forget(monkeypatch, "llama")
    with pytest.raises(GgufError, match="no memory"):
        prove_exact(read_gguf(model), RANGES, progress=lambda _: None, n_bytes_free=1000)


@pytest.mark.parametrize(
    ("window", "n_ctx", "expected"),
    [
        (None, 10_000, N_PREFILL_MIN),
        (uint32(1024), 10_000, 1040),
        (uint32s([0, 512]), 10_000, 528),
        (uint32(4096), 4096, 4092),
        (uint32(2**20), 2**21, N_PREFILL_MAX),
    ],
)
def test_the_prefill_goes_past_the_window(window: object, n_ctx: int, expected: int) -> None:
    metadata = {"general.architecture": string("x"), "x.context_length": uint32(n_ctx)}
    if window is not None:
        metadata["x.attention.sliding_window"] = window  # type: ignore[assignment]
    assert prefill_length(GgufFile(Path("m.gguf"), 3, 32, metadata, (), 0)) == expected
