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


def llama_scores(model: Path, tokens: Sequence[int]) -> list[float]:
    """Natural log-probabilities of the tokens behind the first, each after those before it."""
    done = subprocess.run(
        [sys.executable, __file__, str(model), "--scores", *map(str, tokens)],
        capture_output=True,
        check=True,
        timeout=60,
    )
    return [float(each) for each in json.loads(done.stdout)]


def _print_scores(model: str, tokens: list[int]) -> None:
    import numpy as np
    from llama_cpp import Llama

    llama = Llama(model, n_ctx=N_CTX, n_threads=1, logits_all=True, verbose=False)
    llama.eval(tokens)
    logits = np.array(llama.scores[: len(tokens) - 1], dtype=np.float64)
    llama.close()
    sums = np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1))
    own = logits[np.arange(len(logits)), tokens[1:]] - logits.max(axis=1) - sums
    print(json.dumps(own.tolist()))


def _main(model: str, *prompts: str) -> None:
    if prompts[:1] == ("--scores",):
        _print_scores(model, [int(token) for token in prompts[1:]])
        return
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
