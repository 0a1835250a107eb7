"""Grammars in GBNF: checked before llama.cpp's parser sees them, and made of JSON schemas."""

from __future__ import annotations

import functools
import subprocess
import sys
from typing import Final

from shardmesh.errors import InputError
from shardmesh.wire.limits import (
    GRAMMAR_BYTES_MAX,
    GRAMMAR_GROUPS_MAX,
    GRAMMAR_WORK_TIMEOUT_S,
)

BAD_GRAMMAR: Final = "BAD_GRAMMAR"
BAD_SCHEMA: Final = "BAD_SCHEMA"
SIMPLER: Final = "write it with fewer parts that may be left out or mean the same"
"""The next step for a grammar that takes llama.cpp too long."""

_SCHEMAS_KEPT = 64


def check_grammar(grammar: str) -> None:
    """Raises InputError (theirs) for what could bring the parser down: its recursion has no bound.

    That the grammar means anything is for the parser to say.
    """
    try:
        n_bytes = len(grammar.encode())
    except UnicodeEncodeError as error:
        raise InputError("the grammar holds half of a surrogate pair", code=BAD_GRAMMAR) from error
    if n_bytes > GRAMMAR_BYTES_MAX or "\0" in grammar:
        raise InputError(
            f"a grammar has at most {GRAMMAR_BYTES_MAX} bytes and no zero byte", code=BAD_GRAMMAR
        )
    depth, quote, i = 0, "", 0
    while i < len(grammar):
        letter = grammar[i]
        if quote:
            if letter == "\\" and quote != "\n":
                i += 1
            elif letter == quote:
                quote = ""
        elif letter in '"[#':
            quote = {'"': '"', "[": "]", "#": "\n"}[letter]
        elif letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
        if depth > GRAMMAR_GROUPS_MAX:
            raise InputError(
                f"a grammar nests at most {GRAMMAR_GROUPS_MAX} groups", code=BAD_GRAMMAR
            )
        i += 1


@functools.lru_cache(maxsize=_SCHEMAS_KEPT)
def grammar_of_json_schema(schema: str) -> str:
    """The GBNF of a JSON schema, by llama.cpp's own rules.

    In a process of its own, with bounded time and memory: a short schema can ask for a grammar
    without end.  Blocks meanwhile.  Raises InputError (theirs) for a schema that it cannot do.
    """
    command = [sys.executable, "-m", "shardmesh.engine.grammar_worker"]
    try:
        done = subprocess.run(
            command,
            input=schema.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=GRAMMAR_WORK_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError("the JSON schema takes too long", code=BAD_SCHEMA) from error
    grammar = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0 or not grammar:
        raise InputError(
            "the JSON schema uses something that no grammar can be made of",
            code=BAD_SCHEMA,
            next_step="use type, properties, required, items, enum, const, anyOf and the like",
        )
    if len(grammar.encode()) > GRAMMAR_BYTES_MAX:
        raise InputError("the JSON schema is too large", code=BAD_SCHEMA)
    return grammar
