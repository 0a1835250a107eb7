"""Calls of tools: telling the model of them, and finding what it calls in what it writes.  Pure.

Models write a call in the form that their template taught them; the forms known here are those
of Hermes and Qwen (`<tool_call>`), Mistral (`[TOOL_CALLS]`) and Llama 3 (a bare JSON object).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shardmesh.errors import InputError
from shardmesh.web.call_reader import CallPiece, CallReader
from shardmesh.web.grammars import grammar_of_schema
from shardmesh.web.requests import NamedTool, Tool

_HERMES_OPEN, _HERMES_CLOSE = "<tool_call>", "</tool_call>"
_MISTRAL_OPEN = "[TOOL_CALLS]"
_HERMES_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|\Z)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that the model makes; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """What a request's tools mean for template, sampler and answer."""

    names: frozenset[str] = frozenset()  # of the functions; empty: text stays text
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grammar: str = ""
    marker: str = ""  # begins a call; empty: a JSON object or array at the very beginning does


def plan_tools(
    tools: Sequence[Tool], choice: str | NamedTool | None, template: str | None
) -> ToolPlan:
    """Raises InputError (theirs) for tools that the model's template does not know."""
    if not tools or choice == "none":
        if choice not in (None, "none", "auto"):
            raise InputError("`tool_choice` needs `tools`")
        return ToolPlan()
    if template is None or not re.search(r"\btools\b", template):
        raise InputError(
            "the chat template of this model knows no tools",
            code="NO_TOOLS",
            next_step="leave `tools` out, or use a model that was trained to call them",
        )
    names = [tool.function.name for tool in tools]
    if len(set(names)) != len(names):
        raise InputError("two tools have the same name")
    marker = _marker_of(template)
    wanted = _required(tools, choice)
    return ToolPlan(
        names=frozenset(names),
        variables={"tools": [tool.model_dump(exclude_none=True) for tool in tools]},
        grammar=_call_grammar(wanted, template) if wanted else "",
        marker=marker,
    )


def _marker_of(template: str) -> str:
    return next((mark for mark in (_HERMES_OPEN, _MISTRAL_OPEN) if mark in template), "")


def _required(tools: Sequence[Tool], choice: str | NamedTool | None) -> list[Tool]:
    """The tools of which one has to be called; none if the model may choose to write text."""
    if isinstance(choice, NamedTool):
        wanted = [tool for tool in tools if tool.function.name == choice.function.name]
        if not wanted:
            raise InputError(f"`tool_choice` names {choice.function.name}, which is no tool")
        return wanted
    return list(tools) if choice == "required" else []


def _call_grammar(tools: Sequence[Tool], template: str) -> str:
    """A grammar for exactly one call, in the template's form."""
    arguments = "parameters" if _is_llama(template) else "arguments"
    call = {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    arguments: tool.function.parameters or {"type": "object"},
                },
                "required": ["name", arguments],
            }
            for tool in tools
        ]
    }
    marker = _marker_of(template)
    if marker == _HERMES_OPEN:
        return _wrapped(call, f'"{_HERMES_OPEN}\\n" call "\\n{_HERMES_CLOSE}"')
    if marker == _MISTRAL_OPEN:
        return _wrapped(call, f'("{_MISTRAL_OPEN}")? " "? "[" call "]"')
    return grammar_of_schema(call)


def _wrapped(schema: Mapping[str, Any], root: str) -> str:
    """The schema's grammar as the rule `call` of a grammar with another root."""
    grammar = re.sub(r"^root ::=", "call ::=", grammar_of_schema(schema), flags=re.MULTILINE)
    return f"{grammar}\nroot ::= {root}\n"


def _is_llama(template: str) -> bool:
    return _marker_of(template) == "" and '"parameters"' in template


class ToolScanner:
    """Divides text that comes in pieces into what is shown and the calls behind it."""

    def __init__(self, plan: ToolPlan) -> None:
        self._plan = plan
        self._held = ""  # the beginning of a call, or what may become one
        self._is_call = False
        self._has_shown = False
        self._reader = CallReader(plan.names)
        self._n_read = 0  # characters of the held text that the reader has had

    def feed(self, text: str) -> str:
        """Text that can be shown now."""
        if not self._plan.names:
            return text
        self._held += text
        if self._is_call:
            return ""
        cut = self._cut()
        shown, self._held = self._held[:cut], self._held[cut:]
        self._has_shown = self._has_shown or bool(shown)
        return shown

    def take(self) -> list[CallPiece]:
        """What is new of the calls, for who streams them; `finish` leaves out these calls."""
        if not self._is_call:
            return []
        new, self._n_read = self._held[self._n_read :], len(self._held)
        return self._reader.feed(new)

    @property
    def n_streamed(self) -> int:
        """Calls of which `take` gave a part."""
        return self._reader.n_begun

    @property
    def has_streamed(self) -> bool:
        """Whether calls were taken, the last one to its end."""
        return self._reader.n_begun > 0 and not self._reader.is_cut_off

    def finish(self) -> tuple[str, list[Call]]:
        """The rest: calls, or the text that turned out to be none."""
        calls = [call for call in find_calls(self._held) if call.name in self._plan.names]
        if self.n_streamed:
            return "", calls[self.n_streamed :]
        return ("", calls) if calls else (self._held, [])

    def _cut(self) -> int:
        """Characters of the held text that are certainly not of a call."""
        bare = self._held.lstrip()
        if not self._has_shown and (not bare or bare[0] in "{["):
            is_marker = len(bare) < len(_MISTRAL_OPEN) and _MISTRAL_OPEN.startswith(bare)
            self._is_call = bool(bare) and not is_marker
            return 0
        marker = self._plan.marker
        if not marker:
            return len(self._held)
        at = self._held.find(marker)
        if at >= 0:
            self._is_call = True
            return at
        longest = min(len(marker) - 1, len(self._held))
        begun = next((n for n in range(longest, 0, -1) if self._held.endswith(marker[:n])), 0)
        return len(self._held) - begun


def find_calls(text: str) -> list[Call]:
    """The calls in a finished text; none if it is anything else."""
    if _HERMES_OPEN in text:
        return [call for part in _HERMES_CALL.findall(text) for call in _calls_of(part)]
    return _calls_of(text.replace(_MISTRAL_OPEN, "", 1))


def _calls_of(text: str) -> list[Call]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    found = []
    for each in value if isinstance(value, list) else [value]:
        if not isinstance(each, dict) or not isinstance(each.get("name"), str):
            return []
        arguments = each.get("arguments", each.get("parameters", {}))
        shown = arguments if isinstance(arguments, str) else json.dumps(arguments)
        found.append(Call(each["name"], shown))
    return found
