"""What a user may ask for, and what becomes of it on the wire."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.coordinator.request import (
    CompletionRequest,
    context_needed,
    request_of_command,
    sampling_message,
    uses_history,
)
from shardmesh.engine.base import SamplingSettings
from shardmesh.errors import InputError
from shardmesh.wire.commands import ChatMessage, InferenceParams
from shardmesh.wire.limits import PROMPT_BYTES_MAX
from shardmesh.wire.messages import Sampling

MESSAGES = ({"role": "user", "content": "hi"},)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": "a", "messages": MESSAGES},
        {"prompt": "a", "n_tokens_max": 0},
        {"prompt": "a", "n_tokens_max": -1},
        {"prompt": "x" * (PROMPT_BYTES_MAX + 1)},
        {"prompt": "é" * (PROMPT_BYTES_MAX // 2 + 1)},
    ],
)
def test_requests_that_make_no_sense_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InputError):
        CompletionRequest(**fields)  # type: ignore[arg-type]


def test_a_prompt_or_messages_will_do() -> None:
    assert CompletionRequest(prompt="").prompt == ""
    assert CompletionRequest(messages=MESSAGES).messages == MESSAGES
    CompletionRequest(prompt="x" * PROMPT_BYTES_MAX)
    CompletionRequest(prompt="\ud800")  # no text, but refused where it is tokenized


def test_a_command_becomes_a_request() -> None:
    params = InferenceParams(
        messages=(ChatMessage(role="user", content="hi"),),
        max_tokens=7,
        stop=("x",),
        temperature=0.0,
        seed=5,
        model="m",
    )
    request = request_of_command(params, fresh_seed=99)
    assert request.messages == MESSAGES
    assert (request.n_tokens_max, request.stop, request.model) == (7, ("x",), "m")
    assert (request.sampling.temperature, request.sampling.seed) == (0.0, 5)
    assert request.sampling.top_k == SamplingSettings().top_k


def test_a_fresh_seed_is_used_if_none_is_named() -> None:
    assert request_of_command(InferenceParams(prompt="a"), fresh_seed=99).sampling.seed == 99
    assert request_of_command(InferenceParams(prompt="a", seed=0), fresh_seed=9).sampling.seed == 0


def test_the_wire_has_a_field_for_every_setting() -> None:
    settings = SamplingSettings(temperature=0.25, logit_bias=((1, -1.5),), n_top_logprobs=3)
    message = sampling_message(settings)
    names = {field.name for field in dataclasses.fields(SamplingSettings)}
    assert set(Sampling.__struct_fields__) == names
    assert {name: getattr(message, name) for name in names} == dataclasses.asdict(settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (SamplingSettings(), False),
        (SamplingSettings(repeat_penalty=1.1), True),
        (SamplingSettings(frequency_penalty=0.1), True),
        (SamplingSettings(presence_penalty=-0.1), True),
    ],
)
def test_only_penalties_look_back(settings: SamplingSettings, expected: bool) -> None:
    assert uses_history(settings) is expected


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 100))
def test_the_context_holds_prompt_and_answer_as_far_as_there_is_room(
    n_prompt: int, n_tokens_max: int, n_ctx: int
) -> None:
    if n_prompt >= n_ctx:
        with pytest.raises(InputError) as caught:
            context_needed(n_prompt, n_tokens_max, n_ctx)
        assert caught.value.code == "PROMPT_TOO_LONG"
    else:
        needed = context_needed(n_prompt, n_tokens_max, n_ctx)
        assert n_prompt < needed <= n_ctx
        assert needed == n_prompt + n_tokens_max or needed == n_ctx


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        context_needed(0, 1, 10)
