"""The engine on llama.cpp: refusals, failures and what it takes from the machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chains import OPTIONS, compute, micro, open_sequences, opened, opened_chain
from support.models import BUILT_IN, write_model

from shardmesh.engine import llama, tap
from shardmesh.engine.base import EngineOptions, MicroBatch, SampledToken, SamplingSettings
from shardmesh.engine.llama import load_engine
from shardmesh.engine.options import (
    KvShape,
    check_options,
    choose_flash_attention,
    choose_n_ctx,
    choose_n_threads,
)
from shardmesh.errors import EngineError, GgufError, InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return write_model(folder / "model.gguf", "llama", vocabulary=BUILT_IN)


def test_info(model: Path) -> None:
    with opened(model) as engine:
        info = engine.info
        assert (info.architecture, info.n_layer, info.n_embd) == ("llama", 4, 64)
        assert (info.is_first, info.is_last) == (True, True)
        assert (info.n_ctx, info.n_parallel) == (OPTIONS.n_ctx, OPTIONS.n_parallel)
        assert info.n_vocab > 256
        assert "llama-cpp-python" in info.fingerprint


def test_what_decides_the_bits_is_in_the_fingerprint(model: Path) -> None:
    fingerprints = set()
    for extra in ({}, {"flash_attention": True}, {"cache_type_k": "f32"}):
        options = EngineOptions(n_ctx=256, n_parallel=1, n_threads=1, **extra)  # type: ignore[arg-type]
        with opened(model, options) as engine:
            fingerprints.add(engine.info.fingerprint)
    assert len(fingerprints) == 3


def test_wrong_batches_are_refused_and_change_nothing(model: Path, tmp_path: Path) -> None:
    with opened_chain(model, (2, 2), tmp_path / "shards") as (first, last):
        open_sequences([first, last])
        (before,) = compute([first, last], [micro([first], [1, 2, 3])])
        for engine, wrong in [
            (first, MicroBatch(sequence=0, position=3, tokens=(first.info.n_vocab,))),
            (first, MicroBatch(sequence=0, position=4, tokens=(1,))),
            (last, MicroBatch(sequence=0, position=3, tokens=(1,))),
            (last, MicroBatch(sequence=0, position=3, hidden=np.zeros((1, 3), np.float32))),
        ]:
            with pytest.raises(InputError):
                engine.compute([wrong])
            assert engine.n_held(0) == 3
        for engine in (first, last):
            engine.trim_sequence(0, 0)
        (again,) = compute([first, last], [micro([first], [1, 2, 3])])
    assert before.logits is not None
    assert again.logits is not None
    assert before.logits.tobytes() == again.logits.tobytes()


def test_a_token_is_told_before_it_is_described(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = list[object]()
    describe = llama.describe_choice

    def noted(*choice: Any) -> SampledToken:
        happened.append("described")
        return describe(*choice)

    monkeypatch.setattr(llama, "describe_choice", noted)
    with opened(model) as engine:
        for sequence in (0, 1):
            engine.open_sequence(sequence, SamplingSettings(temperature=0.0))
        first = micro([engine], [1, 2, 3], sample=True)
        (output,) = engine.compute([first], happened.append)
        assert output.sampled is not None
        assert happened == [output.sampled.token, "described"]
        engine.compute([micro([engine], [4])], happened.append)
        both = [micro([engine], [5], sequence, sample=True) for sequence in (0, 1)]
        engine.compute(both, happened.append)
        assert happened[2:] == ["described", "described"], "of a single micro-batch only"


def test_all_sequences_can_be_full(model: Path) -> None:
    options = EngineOptions(n_ctx=256, n_parallel=2, n_threads=1)
    with opened(model, options) as engine:
        open_sequences([engine], (0, 1))
        for sequence in (0, 1):
            compute([engine], [micro([engine], [7] * 256, sequence)])
        with pytest.raises(InputError) as caught:
            compute([engine], [micro([engine], [7], 1)])
        assert caught.value.code == "CONTEXT_FULL"
        engine.trim_sequence(1, 255)
        compute([engine], [micro([engine], [7], 1)])


def test_an_error_in_the_tap_is_raised_and_the_sequence_recovers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no bytes today")

    monkeypatch.setattr(tap, "native_callback", lambda: None)
    with opened_chain(model, (2, 2), tmp_path / "shards") as (first, _):
        first.open_sequence(0)
        with monkeypatch.context() as patched:
            patched.setattr(tap, "ggml_backend_tensor_get", fail)
            with pytest.raises(EngineError, match="could not be read"):
                first.compute([micro([first], [1, 2])])
        with pytest.raises(InputError, match="failed before"):
            first.compute([micro([first], [1, 2])])
        first.trim_sequence(0, 0)
        (output,) = first.compute([micro([first], [1, 2])])
        assert output.hidden is not None
        assert output.hidden.shape == (2, 64)


def test_the_head_is_not_computed_before_the_last_stage(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []
    get_name = tap.ggml_get_name

    def spy(tensor: int) -> bytes:
        asked.append(get_name(tensor))
        return asked[-1]

    monkeypatch.setattr(tap, "native_callback", lambda: None)
    with opened_chain(model, (2, 2), tmp_path / "shards") as (first, _):
        first.open_sequence(0)
        monkeypatch.setattr(tap, "ggml_get_name", spy)
        first.compute([micro([first], [1, 2])])
    assert asked[-1] == b"l_out-1"


def test_a_model_that_cannot_trim_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(model) as engine:
        engine.open_sequence(0)
        compute([engine], [micro([engine], [1, 2, 3])])
        monkeypatch.setattr(llama.api, "llama_memory_seq_rm", lambda *arguments: False)
        with pytest.raises(EngineError) as caught:
            engine.trim_sequence(0, 1)
        assert caught.value.code == "CANNOT_TRIM"
        assert engine.n_held(0) == 3


def test_nothing_works_after_close_but_close(model: Path) -> None:
    engine = load_engine(model, OPTIONS)
    engine.open_sequence(0)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.compute([MicroBatch(sequence=0, position=0, tokens=(1,))])


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model at all")
    with pytest.raises(GgufError):
        load_engine(broken, OPTIONS)


def test_llama_cpp_logs_to_python_at_debug_level(
    model: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG, "shardmesh.llama_cpp"), opened(model):
        pass
    assert any("llama" in record.message for record in caplog.records)
    assert {record.levelno for record in caplog.records} == {logging.DEBUG}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"n_parallel": 0},
        {"n_parallel": 257},
        {"n_ctx": -1},
        {"n_ctx": 2**30},
        {"n_threads": -1},
        {"cache_type_k": "f13"},
        {"cache_type_v": "q8_0", "flash_attention": False},
    ],
)
def test_wrong_options_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        check_options(EngineOptions(**fields))


def test_choices() -> None:
    kv = KvShape(n_embd_k=1024, n_embd_v=1024)  # 4 KiB a token in f16
    gib = 2**30
    assert choose_n_ctx(EngineOptions(n_ctx=999), 512, kv, 0) == 999
    assert choose_n_ctx(EngineOptions(n_parallel=1), 2048, kv, gib) == 2048
    assert choose_n_ctx(EngineOptions(n_parallel=1), 131072, kv, gib) == 4096
    assert choose_n_ctx(EngineOptions(n_parallel=16), 131072, kv, gib // 8) == 1024
    assert choose_n_ctx(EngineOptions(), 131072, kv, 0) == 256
    assert choose_flash_attention(EngineOptions()) is False
    assert choose_flash_attention(EngineOptions(cache_type_v="q8_0")) is True
    assert choose_n_threads(EngineOptions(n_threads=3)) == 3
    assert choose_n_threads(EngineOptions()) >= 1
