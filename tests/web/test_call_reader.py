from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.web.call_reader import CallReader
from shardmesh.web.tools import find_calls

NAMES = ("weather", "time")
ARGUMENTS = {"city": 'Ulm "}" \\ {[', "days": [1, {"a": None}]}


def read(text: str, cuts: list[int]) -> tuple[CallReader, list[tuple[str, str]]]:
    """Names and arguments of the calls in a text that comes in pieces."""
    reader, found = CallReader(NAMES), list[tuple[str, str]]()
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for a, b in itertools.pairwise(bounds):
        for piece in reader.feed(text[a:b]):
            if piece.name is not None:
                assert piece.number == len(found)
                found.append((piece.name, ""))
            name, arguments = found[piece.number]
            found[piece.number] = (name, arguments + piece.arguments)
    return reader, found


def call(name: str, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: ARGUMENTS})


FORMS = (
    f"<tool_call>\n{call('weather')}\n</tool_call>\n<tool_call>\n{call('time')}\n</tool_call>",
    f"[TOOL_CALLS] [{call('weather')}, {call('time')}]",
    f"[{call('weather', 'parameters')},{call('time', 'parameters')}]",
)


@given(st.sampled_from(FORMS), st.lists(st.integers(0, 300), max_size=20))
def test_wherever_the_pieces_are_cut(text: str, cuts: list[int]) -> None:
    reader, found = read(text, cuts)
    assert [(name, json.loads(arguments)) for name, arguments in found] == [
        ("weather", ARGUMENTS),
        ("time", ARGUMENTS),
    ]
    assert [name for name, _ in found] == [call.name for call in find_calls(text)]
    assert not reader.is_cut_off


@given(st.text(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_any_text_can_be_read(text: str, cuts: list[int]) -> None:
    read(text, cuts)
    read(FORMS[0][:90] + text, cuts)


@pytest.mark.parametrize(
    "text",
    ["It rains.", '{"name": "cook", "arguments": {}}', '{"arguments": {}, "name": "time"}', ""],
)
def test_what_is_no_call_of_the_usual_form(text: str) -> None:
    reader, found = read(text, [])
    assert (reader.n_begun, found) == (0, [])


def test_a_call_that_is_cut_off() -> None:
    reader, found = read('<tool_call>{"name": "time", "arguments": {"zone": "U', [])
    assert found == [("time", '{"zone": "U')]
    assert reader.is_cut_off
