"""What llama-cpp-python's own `Llama` writes in one process: the measure of every mesh.

Also a program, since that library leaves files open in the process that imports it.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROMPT = "Once upon a time there was a king who"
PROMPTS = (PROMPT, "Far away, where the swallows fly", "The old queen", "Once")
N_TOKENS = 24
N_CTX = 512


@dataclasses.dataclass(frozen=True)
class Reference:
    """The greedy continuation of a prompt."""

    tokens: list[int]
    text: str


def llama_references(model: Path, prompts: Sequence[str]) -> dict[str, Reference]:
    """The first N_TOKENS tokens after each prompt, at temperature 0, and their text."""
    done = subprocess.run(
        [sys.executable, __file__, str(model), *prompts],
        capture_output=True,
        check=True,
        timeout=60,
    )
    found = [Reference(**fields) for fields in json.loads(done.stdout)]
    return dict(zip(prompts, found, strict=True))


def _main(model: str, *prompts: str) -> None:
    from llama_cpp import Llama

    llama = Llama(model, n_ctx=N_CTX, n_threads=1, verbose=False)
    references = []
    for prompt in prompts:
        answer = llama.create_completion(prompt, max_tokens=N_TOKENS, temperature=0)
        tokens: list[int] = []
        for token in llama.generate(llama.tokenize(prompt.encode()), temp=0):
            if token == llama.token_eos() or len(tokens) == N_TOKENS:
                break
            tokens.append(int(token))
        references.append({"tokens": tokens, "text": answer["choices"][0]["text"]})
    llama.close()
    print(json.dumps(references))


if __name__ == "__main__":
    _main(*sys.argv[1:])
