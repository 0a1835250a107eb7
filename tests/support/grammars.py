"""Grammars that llama.cpp needs more time for than anybody has."""

from __future__ import annotations

_N_DOUBLINGS = 40

OPENS_FOR_EVER = "\n".join(
    [
        "root ::= a0",
        *(f"a{i} ::= a{i + 1} a{i + 1}" for i in range(_N_DOUBLINGS)),
        f'a{_N_DOUBLINGS} ::= "a"?',
    ]
)
"""Some 800 bytes with 2**40 ways to begin."""

SAMPLES_FOR_EVER = "root ::= " + '"a"? ' * 8000
"""It may be opened, but each token is tried in 8,000 places, each of which leads to the others."""
