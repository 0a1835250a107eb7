"""The process that makes a grammar of one JSON schema; see `engine.grammar`."""

from __future__ import annotations

import sys

from llama_cpp.llama_grammar import json_schema_to_gbnf

from shardmesh.confinement import confine
from shardmesh.wire.limits import CHAT_PROCESS_BYTES_MAX, GRAMMAR_BYTES_MAX


def main() -> None:
    """Reads a schema, writes its grammar, or too much of it; any failure is an exit code."""
    confine(CHAT_PROCESS_BYTES_MAX)
    grammar = json_schema_to_gbnf(sys.stdin.buffer.read(GRAMMAR_BYTES_MAX + 1).decode())
    sys.stdout.buffer.write(grammar.encode()[: GRAMMAR_BYTES_MAX + 1])


if __name__ == "__main__":
    main()
