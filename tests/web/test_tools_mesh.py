"""Calls of tools through OpenAI's own package, over a mesh of real processes.

The model has a template that knows tools and was never taught to use them: where a call has to be
made, the grammar on the last stage makes it write a right one.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from shardmesh.demo_model import DEMO_MODEL

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not DEMO_MODEL.exists(), reason="the demo model is not here"),
]

TIMEOUT_S = 60.0
MODEL = "Shardmesh fairy tales"
QUESTION: Any = [{"role": "user", "content": "What is the weather in Ulm?"}]


def function(name: str, field: str, values: list[str]) -> Any:
    parameters = {
        "type": "object",
        "properties": {field: {"type": "string", "enum": values}},
        "required": [field],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = function("weather", "city", ["Ulm", "Bonn"])
TIME = function("time", "zone", ["UTC", "CET"])
NAMED: Any = {"type": "function", "function": {"name": "time"}}
MAKES_A_CALL = (
    'root ::= "Let me look. " "<tool_call>" "\\n" '
    '"{\\"name\\": \\"weather\\", \\"arguments\\": {\\"city\\": \\"Ulm\\"}}" "\\n</tool_call>"'
)
"""What the model would write had it been taught to."""


def ask(client: openai.OpenAI, **settings: Any) -> ChatCompletion:
    given: dict[str, Any] = {"messages": QUESTION, "max_tokens": 100, "temperature": 0}
    answer = client.chat.completions.create(model=MODEL, **{**given, **settings})
    assert isinstance(answer, ChatCompletion)
    return answer


def called(answer: ChatCompletion) -> tuple[str, dict[str, str]]:
    """The one call of an answer."""
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.id
    return call.function.name, json.loads(call.function.arguments)


def test_a_tool_that_has_to_be_called(client: openai.OpenAI) -> None:
    name, arguments = called(ask(client, tools=[WEATHER, TIME], tool_choice="required"))
    field, values = {"weather": ("city", ("Ulm", "Bonn")), "time": ("zone", ("UTC", "CET"))}[name]
    assert arguments.keys() == {field}
    assert arguments[field] in values


def test_a_named_tool(client: openai.OpenAI) -> None:
    answer = ask(client, tools=[WEATHER, TIME], tool_choice=NAMED)
    name, arguments = called(answer)
    assert name == "time"
    assert arguments["zone"] in ("UTC", "CET")
    assert answer.choices[0].message.content is None


def test_a_call_in_a_stream(client: openai.OpenAI) -> None:
    settings: Any = {"tools": [WEATHER, TIME], "tool_choice": NAMED}
    whole = ask(client, **settings)
    pieces: list[ChatCompletionChunk] = list(
        client.chat.completions.create(
            model=MODEL, messages=QUESTION, max_tokens=100, temperature=0, stream=True, **settings
        )
    )
    deltas = [call for p in pieces for c in p.choices for call in c.delta.tool_calls or []]
    assert [d.function.name for d in deltas if d.function and d.function.name] == ["time"]
    assert sum(d.id is not None for d in deltas) == 1
    parts = [d.function.arguments for d in deltas if d.function and d.function.arguments]
    assert len(parts) > 1, "they come as they are written"
    text = "".join(parts)
    assert json.loads(text) == called(whole)[1]
    assert [c.finish_reason for p in pieces for c in p.choices][-1] == "tool_calls"
    assert not any(c.delta.content for p in pieces for c in p.choices)


def test_the_packages_own_helper_for_streams(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=QUESTION, max_tokens=100, tools=[WEATHER], tool_choice="required"
    ) as stream:
        for _ in stream:
            pass
        answer = stream.get_final_completion()
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "weather"


def test_the_result_of_a_call_goes_back(client: openai.OpenAI, url: str) -> None:
    """Call, result and question are all in the prompt, and the next message is text."""
    answer = ask(client, tools=[WEATHER], tool_choice="required")
    message = answer.choices[0].message
    (call,) = message.tool_calls or []
    result = {"role": "tool", "tool_call_id": call.id, "content": "It rains."}
    conversation: Any = [*QUESTION, message, result]
    told = ask(client, messages=conversation, tools=[WEATHER], tool_choice="none", max_tokens=8)
    assert told.choices[0].message.content
    assert told.choices[0].message.tool_calls is None
    assert told.usage is not None
    assert answer.usage is not None
    assert told.usage.prompt_tokens != answer.usage.prompt_tokens
    sent = [*QUESTION, message.model_dump(), result]
    body = {"messages": sent, "tools": [WEATHER]}
    prompt = httpx.post(f"{url}/apply-template", json=body, timeout=TIMEOUT_S).json()["prompt"]
    assert f"result of {call.id}: It rains." in prompt
    assert '"name": "weather", "arguments": {"city":' in prompt


def test_whether_to_call_may_be_left_to_the_model(client: openai.OpenAI) -> None:
    text = ask(client, tools=[WEATHER], tool_choice="auto", max_tokens=8)
    assert text.choices[0].message.content
    assert text.choices[0].message.tool_calls is None
    written = ask(client, tools=[WEATHER], extra_body={"grammar": MAKES_A_CALL})
    assert called(written) == ("weather", {"city": "Ulm"})
    assert written.choices[0].message.content == "Let me look. "


def test_no_tools_at_all(client: openai.OpenAI) -> None:
    """The template is used; what looks like a call stays text where no tool may be called."""
    extra: Any = {"grammar": MAKES_A_CALL}
    for settings in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        answer = ask(client, extra_body=extra, **settings)
        assert "<tool_call>" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason == "stop"


def test_a_choice_that_cannot_be(client: openai.OpenAI) -> None:
    for settings in ({"tools": [WEATHER], "tool_choice": NAMED}, {"tool_choice": "required"}):
        with pytest.raises(openai.BadRequestError):
            ask(client, **settings)
