"""The fake engine: a chain equals the whole, and every mix-up of rows shows in the tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.engine.base import Hidden, MicroBatch, SamplingSettings
from shardmesh.engine.fake import FakeEngine, fake_chain, fake_info
from shardmesh.errors import EngineError, InputError

GREEDY = SamplingSettings(temperature=0.0)


def open_all(
    chain: Sequence[FakeEngine], sequence: int = 0, sampling: SamplingSettings = GREEDY
) -> None:
    for engine in chain:
        engine.open_sequence(sequence, sampling)


def step(chain: Sequence[FakeEngine], tokens: Sequence[int], sequence: int = 0) -> int:
    """Passes tokens through the chain and returns the sampled one."""
    position = chain[0].n_held(sequence)
    hidden: Hidden | None = None
    for engine in chain:
        micro = MicroBatch(
            sequence=sequence,
            position=position,
            tokens=tuple(tokens) if hidden is None else None,
            hidden=hidden,
            sample=True,
        )
        (output,) = engine.compute([micro])
        hidden = output.hidden
    assert output.sampled is not None
    return output.sampled.token


def generate(chain: Sequence[FakeEngine], prompt: Sequence[int], n: int, seq: int = 0) -> list[int]:
    tokens = [step(chain, prompt, seq)]
    while len(tokens) < n:
        tokens.append(step(chain, tokens[-1:], seq))
    return tokens


@given(
    prompt=st.lists(st.integers(0, 63), min_size=1, max_size=8),
    cuts=st.sets(st.integers(1, 5), max_size=4),
    temperature=st.sampled_from([0.0, 0.8]),
)
def test_chain_equals_whole(prompt: list[int], cuts: set[int], temperature: float) -> None:
    sampling = SamplingSettings(temperature=temperature, seed=7)
    texts = []
    for boundaries in ((0, 6), (0, *sorted(cuts), 6)):
        chain = fake_chain(boundaries)
        open_all(chain, 0, sampling)
        texts.append(generate(chain, prompt, 6))
    assert texts[0] == texts[1]


@given(cut=st.integers(1, 5))
def test_the_division_into_micro_batches_does_not_matter(cut: int) -> None:
    prompt = [3, 1, 4, 1, 5, 9]
    whole, pieces = fake_chain((0, 2, 4)), fake_chain((0, 2, 4))
    open_all(whole)
    open_all(pieces)
    step(pieces, prompt[:cut])
    assert step(whole, prompt) == step(pieces, prompt[cut:])


def hidden_of(prompt: Sequence[int]) -> Hidden:
    first = fake_chain((0, 2, 4))[0]
    first.open_sequence(0)
    (output,) = first.compute([MicroBatch(sequence=0, position=0, tokens=tuple(prompt))])
    assert output.hidden is not None
    return output.hidden


def logits_of(hidden: Hidden) -> list[float]:
    last = fake_chain((0, 2, 4))[1]
    last.open_sequence(0, GREEDY)
    (output,) = last.compute([MicroBatch(sequence=0, position=0, hidden=hidden, want_logits=True)])
    assert output.logits is not None
    return output.logits.tolist()


@pytest.mark.parametrize(
    "mix_up",
    [
        pytest.param(lambda h: h[1:], id="lost"),
        pytest.param(lambda h: np.concatenate([h[:1], h]), id="doubled"),
        pytest.param(lambda h: h[[1, 0, 2]], id="swapped"),
        pytest.param(lambda h: np.where(h == h[0, 0], 0, h).astype(np.float32), id="one number"),
    ],
)
def test_a_mix_up_changes_the_logits(mix_up: object) -> None:
    assert callable(mix_up)
    hidden = hidden_of([1, 2, 3])
    assert logits_of(mix_up(hidden)) != logits_of(hidden)


def test_sequences_do_not_touch_each_other() -> None:
    chain = fake_chain((0, 4))
    open_all(chain, 0)
    open_all(chain, 1)
    alone = fake_chain((0, 4))
    open_all(alone, 0)
    step(chain, [9, 9], 1)
    first = step(chain, [1, 2], 0)
    step(chain, [8], 1)
    assert [first, step(chain, [first], 0)] == generate(alone, [1, 2], 2)


def test_trim_and_go_on() -> None:
    chain = fake_chain((0, 2, 4))
    open_all(chain)
    expected = generate(chain, [5, 6, 7], 4)
    for engine in chain:
        engine.trim_sequence(0, 3)
        assert engine.n_held(0) == 3
    assert step(chain, expected[:1]) == expected[1]


def test_hidden_states_are_exact_integers() -> None:
    hidden = hidden_of(range(20))
    assert (hidden == np.round(hidden)).all()
    assert hidden.max() < 2**24


def test_seed_and_bias_have_an_effect() -> None:
    def tokens(**settings: object) -> list[int]:
        chain = fake_chain((0, 4))
        open_all(chain, 0, SamplingSettings(**settings))  # type: ignore[arg-type]
        return generate(chain, [1, 2, 3], 8)

    assert tokens(seed=1) == tokens(seed=1) != tokens(seed=2)
    assert tokens(temperature=0.0, logit_bias=((5, 1000.0),)) == [5] * 8


def test_a_failed_computation_leaves_the_sequence_unusable_until_trimmed() -> None:
    failures = [EngineError("broken")]

    def fail_once(n_rows: int) -> None:
        if failures:
            raise failures.pop()

    engine = FakeEngine(fake_info(), before_compute=fail_once)
    engine.open_sequence(0, GREEDY)
    micro = MicroBatch(sequence=0, position=0, tokens=(1,))
    with pytest.raises(EngineError):
        engine.compute([micro])
    with pytest.raises(InputError, match="failed before"):
        engine.compute([micro])
    engine.trim_sequence(0, 0)
    engine.compute([micro])


ONE_ROW = np.zeros((1, 8), np.float32)
WRONG: list[tuple[str, dict[str, object]]] = [
    ("at least one token", {"tokens": ()}),
    ("either tokens or hidden", {"tokens": (1,), "hidden": ONE_ROW}),
    ("either tokens or hidden", {}),
    ("first stage takes tokens", {"hidden": ONE_ROW}),
    ("not in the vocabulary", {"tokens": (64,)}),
    ("not in the vocabulary", {"tokens": (-1,)}),
    ("goes on at 1", {"tokens": (1,), "position": 2}),
    ("goes on at 1", {"tokens": (1,), "position": 0}),
    ("not open", {"tokens": (1,), "sequence": 1}),
    ("rows in one batch", {"tokens": (1,) * 64}),
    ("context of 70 tokens is full", {"tokens": (1,) * 70}),
    ("without sampling", {"tokens": (1,), "sequence": 2, "position": 0, "sample": True}),
]


@pytest.mark.parametrize(("sentence", "fields"), WRONG)
def test_wrong_batches_are_refused_before_anything_is_computed(
    sentence: str, fields: dict[str, object]
) -> None:
    engine = FakeEngine(dataclasses.replace(fake_info(n_ctx=70), is_last=True))
    engine.open_sequence(0, GREEDY)
    engine.open_sequence(2)
    good = MicroBatch(sequence=0, position=0, tokens=(1,))
    bad = MicroBatch(**({"sequence": 0, "position": 1} | fields))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=sentence):
        engine.compute([good, bad])
    assert engine.n_held(0) == 0
    engine.compute([good])


@pytest.mark.parametrize(
    "hidden",
    [
        np.zeros((1, 7), np.float32),
        np.zeros((8,), np.float32),
        np.zeros((1, 8), np.float64),
    ],
)
def test_wrong_hidden_states_are_refused(hidden: Hidden) -> None:
    last = fake_chain((0, 2, 4))[1]
    last.open_sequence(0, GREEDY)
    with pytest.raises(InputError):
        last.compute([MicroBatch(sequence=0, position=0, hidden=hidden)])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": 2**32},
        {"n_top_logprobs": 1000},
        {"logit_bias": ((64, 1.0),)},
        {"logit_bias": ((1, float("inf")),)},
        {"repeat_penalty": 0.0},
    ],
)
def test_wrong_sampling_settings_are_refused(settings: dict[str, object]) -> None:
    engine = fake_chain((0, 4))[0]
    with pytest.raises(InputError):
        engine.open_sequence(0, SamplingSettings(**settings))  # type: ignore[arg-type]


def test_top_logprobs_are_ordered_and_belong_to_the_raw_logits() -> None:
    engine = fake_chain((0, 4))[0]
    engine.open_sequence(0, SamplingSettings(temperature=0.0, n_top_logprobs=64))
    (output,) = engine.compute(
        [MicroBatch(sequence=0, position=0, tokens=(1, 2), sample=True, want_logits=True)]
    )
    assert output.sampled is not None
    assert output.logits is not None
    logprobs = [logprob for _, logprob in output.sampled.top_logprobs]
    assert logprobs == sorted(logprobs, reverse=True)
    assert np.exp(logprobs).sum() == pytest.approx(1.0)
    assert output.sampled.top_logprobs[0] == (output.sampled.token, output.sampled.logprob)
    assert output.sampled.token == int(output.logits.argmax())
