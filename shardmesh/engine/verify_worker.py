"""One process of `shardmesh verify`: a model file, all steps, one file of results.

A task comes as JSON on standard input; an error of ours goes as JSON to standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from shardmesh.engine.base import Engine, EngineOptions, MicroBatch
from shardmesh.errors import Blame, InputError, ShardmeshError

EXIT_KNOWN_ERROR = 3

PREFILL_TOKENS_MIN = 16
"""Tokens of the prefill at least: fewer would not use the code that computes many rows at once."""


class VerifyTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to compute; paths of .npy files.

    The whole model gets `prompt` (empty: `n_prefill` made-up tokens) and `n_greedy`, and writes
    `tokens_path`.  A shard gets `inputs_path`: token ids (n,) or hidden states (n, n_embd), and
    `n_prompt`.  The prompt goes in micro-batches of `piece_tokens`.  Written to `outputs_path`:
    hidden states of all rows, or the logits of each step's last row, (n_steps, n_vocab).
    """

    model_path: str
    outputs_path: str
    piece_tokens: int
    prompt: str = ""
    n_prefill: int = PREFILL_TOKENS_MIN
    n_greedy: int = 0
    tokens_path: str = ""
    inputs_path: str = ""
    n_prompt: int = 0


class VerifyFailure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An error of the worker, as `errors.error_from_wire` takes it."""

    code: str
    blame: Blame
    sentence: str
    next_step: str


def step_lengths(n_prompt: int, n_single: int, piece_tokens: int) -> list[int]:
    """The tokens of each micro-batch: the prefill, then single ones."""
    full, rest = divmod(n_prompt, piece_tokens)
    return [piece_tokens] * full + [rest] * bool(rest) + [1] * n_single


def main() -> None:
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=VerifyTask)
    try:
        compute_task(task)
    except ShardmeshError as error:
        failure = VerifyFailure(
            code=error.code, blame=error.blame, sentence=str(error), next_step=error.next_step
        )
        sys.stdout.buffer.write(msgspec.json.encode(failure))
        sys.exit(EXIT_KNOWN_ERROR)


def compute_task(task: VerifyTask) -> None:
    """Computes and writes; raises ShardmeshError, or llama.cpp ends the process."""
    if task.inputs_path:
        inputs = np.load(task.inputs_path, allow_pickle=False)
        lengths = step_lengths(task.n_prompt, len(inputs) - task.n_prompt, task.piece_tokens)
    else:
        inputs = np.array(_prompt_tokens(task), dtype=np.int32)
        lengths = step_lengths(len(inputs), task.n_greedy, task.piece_tokens)
    is_whole = not task.inputs_path
    engine = _load(task.model_path, sum(lengths), own_kernels=not is_whole)
    try:
        engine.open_sequence(0)
        outputs = _compute_steps(engine, inputs, lengths, task.tokens_path)
    finally:
        engine.close()
    np.save(task.outputs_path, outputs, allow_pickle=False)


def _load(path: str, n_tokens: int, *, own_kernels: bool) -> Engine:
    """Shards as listeners have them, held against llama.cpp as it is."""
    from shardmesh.engine.llama import load_engine

    options = EngineOptions(n_ctx=n_tokens, n_parallel=1, own_kernels=own_kernels)
    return load_engine(Path(path), options)


def _compute_steps(
    engine: Engine, inputs: npt.NDArray[np.generic], lengths: Sequence[int], tokens_path: str
) -> npt.NDArray[np.float32]:
    """Results of all steps; tokens that `inputs` lacks are the greedy ones, and are saved."""
    results = []
    position = 0
    for length in lengths:
        rows = inputs[position : position + length]
        is_text = inputs.ndim == 1
        micro = MicroBatch(
            sequence=0,
            position=position,
            tokens=tuple(rows.tolist()) if is_text else None,
            hidden=None if is_text else rows,  # type: ignore[arg-type]  # checked by the engine
            want_logits=True,
        )
        (output,) = engine.compute([micro])
        position += length
        if output.hidden is not None:
            results.append(output.hidden)
        elif output.logits is not None:
            results.append(output.logits[np.newaxis])
            if position == len(inputs) and is_text:
                inputs = np.append(inputs, np.int32(output.logits.argmax()))
    if tokens_path:
        np.save(tokens_path, inputs[:position], allow_pickle=False)
    return np.concatenate(results)


def _prompt_tokens(task: VerifyTask) -> list[int]:
    """The prompt's tokens, repeated up to the smallest prefill; made-up ones without a prompt."""
    from shardmesh.engine.tokenizer import Tokenizer

    with Tokenizer.open(Path(task.model_path)) as tokenizer:
        if not task.prompt:
            # A vocabulary may be missing; prime steps visit all parts of the embedding.
            return [(7919 * i + 13) % tokenizer.n_vocab for i in range(task.n_prefill)]
        tokens = tokenizer.encode(task.prompt)
    if not tokens:
        raise InputError("the prompt has no tokens")
    n_times = -(-PREFILL_TOKENS_MIN // len(tokens))
    return tokens * n_times


if __name__ == "__main__":
    main()
