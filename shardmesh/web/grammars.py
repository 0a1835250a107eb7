"""Grammars for llama.cpp's sampler out of JSON schemas.  Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from shardmesh.engine.grammar import grammar_of_json_schema
from shardmesh.errors import InputError
from shardmesh.wire.limits import GRAMMAR_BYTES_MAX, NESTING_MAX

JSON_OBJECT_GRAMMAR: Final = r"""root ::= object
value ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
"""Any JSON object, with bounded white space: a model may else write blanks for ever."""


def grammar_of_schema(schema: Mapping[str, Any]) -> str:
    """A grammar for exactly the texts that a JSON schema describes.

    Raises InputError (theirs) for a schema that is too large or not understood.
    """
    if not schema:
        return JSON_OBJECT_GRAMMAR
    if _depth(schema) > NESTING_MAX:
        raise InputError(f"the JSON schema is nested deeper than {NESTING_MAX}", code="BAD_SCHEMA")
    text = json.dumps(schema)
    if len(text) > GRAMMAR_BYTES_MAX:
        raise InputError(
            f"the JSON schema has more than {GRAMMAR_BYTES_MAX} characters", code="BAD_SCHEMA"
        )
    return grammar_of_json_schema(text)


def _depth(value: Any) -> int:
    """Deepest nesting, found without recursion: a stranger chose it."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        each, depth = waiting.pop()
        if isinstance(each, Mapping | list):
            deepest = max(deepest, depth)
            inner = each.values() if isinstance(each, Mapping) else each
            waiting += [(item, depth + 1) for item in inner]
    return deepest
