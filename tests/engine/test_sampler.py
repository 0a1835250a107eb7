"""Sampling on llama.cpp: every setting has its effect, and tokens are those of llama-cpp-python."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import llama_cpp as api
from support.chains import OPTIONS, compute, micro, opened
from support.models import BUILT_IN, write_model

from shardmesh.engine import sampler
from shardmesh.engine.base import Engine, SampledToken, SamplingSettings
from shardmesh.engine.sampler import takes_highest
from shardmesh.errors import InputError

PROMPT = [5, 60, 61, 62, 63, 64, 60, 61]
N_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sampler")
    return write_model(folder / "model.gguf", "llama", vocabulary=BUILT_IN)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with opened(model) as whole:
        yield whole


def generate(
    engine: Engine, settings: SamplingSettings, history: Sequence[int] = PROMPT, n: int = N_TOKENS
) -> list[SampledToken]:
    engine.open_sequence(0, settings, history)
    tokens, sampled = PROMPT, []
    for _ in range(n):
        (output,) = compute([engine], [micro([engine], tokens, sample=True, want_logits=False)])
        assert output.sampled is not None
        assert output.logits is None
        sampled.append(output.sampled)
        tokens = [output.sampled.token]
    return sampled


def tokens_of(
    engine: Engine, history: Sequence[int] = PROMPT, n: int = N_TOKENS, **settings: Any
) -> list[int]:
    return [each.token for each in generate(engine, SamplingSettings(**settings), history, n)]


HOT = {"temperature": 3.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 11}


GREEDY_AND_MORE = [
    {"repeat_penalty": 1.1},
    {"frequency_penalty": 0.1},
    {"presence_penalty": 0.1},
    {"logit_bias": ((7, 1.0),)},
    {"temperature": 0.1},
    {"grammar": 'root ::= "a"'},
]


def test_without_chance_and_penalties_it_is_the_highest(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert takes_highest(SamplingSettings(temperature=0.0, top_k=3, top_p=0.1, min_p=0.9, seed=5))
    for more in GREEDY_AND_MORE:
        assert not takes_highest(SamplingSettings(**{"temperature": 0.0, **more}))
    quick = tokens_of(engine, temperature=0.0)
    monkeypatch.setattr(sampler, "takes_highest", lambda settings: False)
    assert tokens_of(engine, temperature=0.0) == quick


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=20))
def test_of_equal_logits_llama_takes_the_first_as_well(values: list[float]) -> None:
    chain = api.llama_sampler_init_greedy()
    entries = [api.llama_token_data(i, value, 0.0) for i, value in enumerate(values)]
    data = (api.llama_token_data * len(entries))(*entries)
    candidates = api.llama_token_data_array(data, len(entries), -1, False)
    api.llama_sampler_apply(chain, ctypes.byref(candidates))
    api.llama_sampler_free(chain)
    assert candidates.selected == np.array(values, dtype=np.float32).argmax()


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1.0},
        {"top_k": 3},
        {"top_p": 0.3},
        {"min_p": 0.5},
        {"typical_p": 0.2},
        {"repeat_penalty": 5.0},
        {"frequency_penalty": 4.0},
        {"presence_penalty": 20.0},
        {"seed": 12},
        {"logit_bias": ((7, 50.0),)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_has_an_effect_and_is_repeatable(
    engine: Engine, change: dict[str, Any]
) -> None:
    usual = tokens_of(engine, **HOT)
    changed = tokens_of(engine, **(HOT | change))
    assert changed != usual
    assert changed == tokens_of(engine, **(HOT | change))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "repeat_penalty": 1.8},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.8, "min_p": 0.01, "seed": 4},
        {"temperature": 2.0, "typical_p": 0.6, "frequency_penalty": 0.7, "seed": 5},
        {"temperature": 1.5, "presence_penalty": 0.9, "repeat_penalty": 1.2, "seed": 6},
    ],
)
def test_tokens_are_those_of_llama_cpp_python(
    engine: Engine, model: Path, settings: dict[str, Any]
) -> None:
    reference = llama_cpp.Llama(str(model), n_ctx=256, n_threads=1, verbose=False)
    try:
        reference.set_seed(settings.get("seed", 0))
        names = {"temperature": "temp"}
        arguments = {names.get(k, k): v for k, v in settings.items() if k != "seed"}
        stream = reference.generate(PROMPT, **arguments)
        expected = [next(stream) for _ in range(N_TOKENS)]
        stream.close()
    finally:
        reference.close()
    # llama-cpp-python does not show the prompt to its penalties.
    assert tokens_of(engine, history=(), **settings) == expected


def test_penalties_look_back_on_the_history(engine: Engine) -> None:
    (usual,) = tokens_of(engine, n=1, temperature=0.0)
    punished = {"temperature": 0.0, "presence_penalty": 100.0, "n": 1}
    assert tokens_of(engine, history=[usual], **punished) != [usual]
    assert tokens_of(engine, history=[], **punished) == [usual]
    far_back = [usual] + [9] * 4
    assert tokens_of(engine, history=far_back, repeat_last_n=4, **punished) == [usual]
    assert tokens_of(engine, history=far_back, repeat_last_n=5, **punished) != [usual]


def test_a_forbidden_token_is_not_chosen(engine: Engine) -> None:
    (usual,) = tokens_of(engine, n=1, temperature=0.0)
    bias = ((usual, -1e9),)
    assert usual not in tokens_of(engine, n=1, temperature=0.0, logit_bias=bias)
    assert usual not in tokens_of(engine, **(HOT | {"logit_bias": bias}))


def test_log_probabilities_are_of_the_raw_logits(engine: Engine) -> None:
    settings = SamplingSettings(temperature=3.0, top_k=2, seed=1, n_top_logprobs=5)
    engine.open_sequence(0, settings)
    (output,) = compute([engine], [micro([engine], PROMPT, sample=True)])
    assert output.sampled is not None
    assert output.logits is not None
    wide = output.logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide - wide.max()).sum()) - wide.max()
    assert output.sampled.logprob == pytest.approx(expected[output.sampled.token], abs=1e-5)
    order = np.argsort(-wide)[:5]
    assert [token for token, _ in output.sampled.top_logprobs] == order.tolist()
    for token, logprob in output.sampled.top_logprobs:
        assert logprob == pytest.approx(expected[token], abs=1e-5)


def test_sequences_have_samplers_of_their_own(engine: Engine) -> None:
    alone = tokens_of(engine, n=6, temperature=1.5, seed=8)
    for sequence in (1, 2):
        engine.open_sequence(sequence, SamplingSettings(temperature=1.5, seed=8), PROMPT)
    both: dict[int, list[int]] = {1: [], 2: []}
    for _ in range(6):
        batch = [
            micro([engine], both[s][-1:] or PROMPT, s, sample=True, want_logits=False)
            for s in (1, 2)
        ]
        for sequence, output in zip((1, 2), engine.compute(batch), strict=True):
            assert output.sampled is not None
            both[sequence].append(output.sampled.token)
    assert both == {1: alone, 2: alone}


def test_bad_settings_leave_no_sequence_behind(engine: Engine) -> None:
    engine.close_sequence(0)
    with pytest.raises(InputError):
        engine.open_sequence(0, SamplingSettings(top_p=2.0))
    with pytest.raises(InputError):
        engine.open_sequence(0, SamplingSettings(), history=[engine.info.n_vocab])
    with pytest.raises(InputError):
        engine.open_sequence(OPTIONS.n_parallel, SamplingSettings())
    with pytest.raises(InputError, match="not open"):
        compute([engine], [micro([engine], [1])])
