"""Calls of tools while they are still being written, so that arguments can be streamed.  Pure.

Reads the usual form, a JSON object with the name first.  What is written in another way is left to
`web.tools.find_calls` at the end.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final, NamedTuple

_BEGINNING: Final = re.compile(
    r"(?:</?tool_call>|\[TOOL_CALLS\]|[\s,;\[\]}])*"  # of this call, and the end of the one before
    r'\{\s*"name"\s*:\s*"(?P<name>[\w.-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class CallPiece(NamedTuple):
    """What is new of a call: its name at the beginning, then its arguments bit by bit."""

    number: int
    name: str | None
    arguments: str


class CallReader:
    """Follows calls of the tools with these names."""

    def __init__(self, names: Collection[str]) -> None:
        self.n_begun = 0
        self._names = names
        self._text = ""
        self._at = 0  # characters that were read
        self._depth = 0  # of the braces of the arguments under way
        self._is_inside = False  # of arguments
        self._is_string = False
        self._is_escaped = False

    @property
    def is_cut_off(self) -> bool:
        """Whether the last call has begun and not ended."""
        return self._is_inside

    def feed(self, text: str) -> list[CallPiece]:
        """What the next part of the text adds."""
        self._text += text
        pieces: list[CallPiece] = []
        while self._at < len(self._text):
            if not self._is_inside:
                begun = _BEGINNING.match(self._text, self._at)
                if begun is None or begun["name"] not in self._names:
                    break
                pieces.append(CallPiece(self.n_begun, begun["name"], ""))
                self._at, self._is_inside = begun.end(), True
                self.n_begun += 1
            arguments = self._arguments()
            if arguments:
                pieces.append(CallPiece(self.n_begun - 1, None, arguments))
        return pieces

    def _arguments(self) -> str:
        """The arguments as far as they are there; leaves them where their last brace closes."""
        start = self._at
        while self._at < len(self._text) and self._is_inside:
            letter = self._text[self._at]
            self._at += 1
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                self._is_escaped = letter == "\\"
                self._is_string = letter != '"'
            elif letter == '"':
                self._is_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                self._is_inside = self._depth > 0
        return self._text[start : self._at]
