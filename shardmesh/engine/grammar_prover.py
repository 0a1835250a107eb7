"""The process that tries one grammar before a stage has to follow it; see `prove_command`.

llama.cpp may need time or memory without end for a grammar of some hundred bytes, and cannot be
interrupted.  Here that hurts nobody: the answer is the exit status, and no answer is one, too.
"""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path
from typing import Final

from shardmesh.confinement import confine, confine_time
from shardmesh.engine.grammar_sampler import GrammarSampler
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import InputError, ShardmeshError
from shardmesh.wire.limits import (
    CHAT_PROCESS_BYTES_MAX,
    GRAMMAR_BYTES_MAX,
    GRAMMAR_WORK_TIMEOUT_S,
)

GOOD: Final = 0
NO_GBNF: Final = 3
DEAD_END: Final = 4
NO_VOCABULARY: Final = 5

_N_STEPS = 4
"""Tokens that the text begins with: a grammar that is slow later on is the stage's own to end."""


def prove_command(vocabulary: Path) -> list[str]:
    """The command that tries the grammar on its standard input with this vocabulary.

    It exits with one of the numbers above; with any other, or killed, it took too much.
    """
    return [sys.executable, "-m", "shardmesh.engine.grammar_prover", str(vocabulary)]


def main(vocabulary: Path) -> int:
    """Reads a grammar and goes some steps with it."""
    confine_time(math.ceil(GRAMMAR_WORK_TIMEOUT_S))  # should nobody be left to kill it
    grammar = sys.stdin.buffer.read(GRAMMAR_BYTES_MAX + 1).decode()
    try:
        tokenizer = Tokenizer.open(vocabulary)
    except ShardmeshError:
        return NO_VOCABULARY
    confine(CHAT_PROCESS_BYTES_MAX)
    try:
        sampler = GrammarSampler(grammar, tokenizer)
    except InputError:
        return NO_GBNF
    return GOOD if _goes_on(sampler, tokenizer) else DEAD_END


def _goes_on(sampler: GrammarSampler, tokenizer: Tokenizer) -> bool:
    """Whether a text can begin at all; where one of its ways leads to is not asked."""
    choices = random.Random(0)
    for number in range(_N_STEPS):
        allowed = sampler.allowed()
        if not allowed.size:
            return number > 0
        token = int(choices.choice(allowed))
        if tokenizer.is_end(token):
            return True
        sampler.accept(token)
    return True


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
