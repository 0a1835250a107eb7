from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import InputError
from shardmesh.web.requests import NamedTool, Tool
from shardmesh.web.tools import Call, ToolPlan, ToolScanner, find_calls, plan_tools

HERMES = "{% for t in tools %}{{ t }}{% endfor %}<tool_call>"
MISTRAL = "{{ tools }}[TOOL_CALLS]"
LLAMA = '{{ tools }} {"name": .., "parameters": ..}'
WEATHER = Tool.model_validate(
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
)
CALL = Call("weather", '{"city": "Ulm"}')


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>',
        'Let me look.<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}',
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}]',
        '{"name": "weather", "parameters": {"city": "Ulm"}}',
    ],
)
def test_calls_in_the_known_forms(text: str) -> None:
    assert find_calls(text) == [CALL]


@pytest.mark.parametrize("text", ["", "It rains.", "{", "[1, 2]", '{"city": "Ulm"}', "[" * 10_000])
def test_text_that_is_no_call(text: str) -> None:
    assert find_calls(text) == []


@given(st.lists(st.integers(0, 80), max_size=6), st.sampled_from([HERMES, MISTRAL, LLAMA]))
def test_the_cuts_do_not_matter(cuts: list[int], template: str) -> None:
    inner = '{"name": "weather", "%s": {"city": "Ulm"}}'
    text = {
        HERMES: "Well < " + "<tool_call>" + inner % "arguments" + "</tool_call>",
        MISTRAL: "[TOOL_CALLS][" + inner % "arguments" + "]",
        LLAMA: inner % "parameters",
    }[template]
    scanner = ToolScanner(plan_tools([WEATHER], "auto", template))
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    shown = "".join(scanner.feed(text[a:b]) for a, b in itertools.pairwise(bounds))
    assert shown == ("Well < " if template == HERMES else "")
    assert scanner.finish() == ("", [CALL])


def streamed(text: str, template: str) -> tuple[str, list[str], list[Call]]:
    """What is shown, the names that are streamed, and the calls that come at the end."""
    scanner = ToolScanner(plan_tools([WEATHER], "auto", template))
    shown, names = "", list[str]()
    for letter in text:
        shown += scanner.feed(letter)
        names += [piece.name for piece in scanner.take() if piece.name is not None]
    rest, calls = scanner.finish()
    return shown + rest, names, calls


def test_calls_are_streamed_in_the_form_of_mistral() -> None:
    text = '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Ulm"}}]'
    assert streamed(text, MISTRAL) == ("", ["weather"], [])


@pytest.mark.parametrize(
    "between",
    [" and <tool_call>", '<tool_call>{"name": "cook", "arguments": {}}</tool_call><tool_call>'],
)
def test_a_call_that_cannot_be_streamed_comes_at_the_end(between: str) -> None:
    call = '{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
    found = streamed(f"<tool_call>{call}{between}{call}", HERMES)
    assert found == ("", ["weather"], [CALL])


def test_what_looks_like_a_call_and_is_none_is_shown_in_the_end() -> None:
    scanner = ToolScanner(plan_tools([WEATHER], None, HERMES))
    assert scanner.feed('{"name": "cook"}') == ""
    assert scanner.finish() == ('{"name": "cook"}', [])


def test_without_tools_all_is_text() -> None:
    scanner = ToolScanner(ToolPlan())
    assert scanner.feed("<tool_call>") == "<tool_call>"


def test_templates_that_know_no_tools_are_told_apart() -> None:
    for template in (None, "{{ messages }}"):
        with pytest.raises(InputError) as caught:
            plan_tools([WEATHER], "auto", template)
        assert caught.value.code == "NO_TOOLS"
        assert plan_tools([WEATHER], "none", template) == ToolPlan()


def test_a_tool_that_must_be_called_makes_a_grammar() -> None:
    named = NamedTool.model_validate({"type": "function", "function": {"name": "weather"}})
    grammar = plan_tools([WEATHER], named, HERMES).grammar
    assert "<tool_call>" in grammar
    assert json.dumps(json.dumps("weather"))[1:-1] in grammar
    other = NamedTool.model_validate({"type": "function", "function": {"name": "cook"}})
    with pytest.raises(InputError, match="no tool"):
        plan_tools([WEATHER], other, HERMES)
