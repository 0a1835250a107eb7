"""Proof that a model computes the same bits cut as whole; behind `shardmesh verify`.

The whole model and each shard run in a process of their own, one after the other: the whole one
chooses its greedy tokens, and as all tokens are then known, each shard can compute all steps
before the next begins.  No more than one of them is in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shardmesh.engine.verify_worker import (
    EXIT_KNOWN_ERROR,
    PREFILL_TOKENS_MIN,
    VerifyFailure,
    VerifyTask,
)
from shardmesh.errors import EngineError, InputError, error_from_wire
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.layers import LayerRange
from shardmesh.shards.names import shard_name
from shardmesh.shards.piece_tokens import AUTO
from shardmesh.shards.split import piece_tokens_for, split_model
from shardmesh.wire.limits import PROMPT_BYTES_MAX

N_SINGLE_STEPS_MAX = 4096
"""Single steps; the logits of all of them are kept, half a megabyte each for a large vocabulary."""

Progress = Callable[[str], None]
RunTask = Callable[[VerifyTask, str, float], None]
"""Runs one worker to its end, as `run_task` does."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The result; field names are those of the JSON output."""

    identical: bool
    max_abs_diff: float
    greedy_equal: bool
    n_layers: int
    layer_ranges: tuple[tuple[int, int], ...]
    n_steps: int
    architecture: str


def verify_model(
    model: Path,
    ranges: Sequence[LayerRange],
    *,
    n_single: int,
    prompt: str,
    timeout_s: float,
    progress: Progress,
    n_prefill: int = PREFILL_TOKENS_MIN,
    piece_tokens: int | None = AUTO,
    run: RunTask | None = None,
) -> VerifyReport:
    """Cuts the model into a temporary folder and compares cut with whole, bit for bit.

    `timeout_s` is for each process, started by `run` (`run_task` if None); `progress` gets a line
    before each part; `n_prefill` is the number of made-up tokens without a prompt; `piece_tokens`
    is what the model is to be split with.  Raises InputError (theirs) for a model or prompt that
    cannot be used, EngineError (ours) when a process dies or takes too long.  Nothing is left
    behind.
    """
    gguf = read_gguf(model)
    start = functools.partial(_start, run or run_task, timeout_s)
    _check_inputs(gguf.get_int("shardmesh.n_shards", 1), n_single, prompt)
    piece_tokens = piece_tokens_for(gguf, len(ranges), piece_tokens)
    with tempfile.TemporaryDirectory(prefix="shardmesh-verify-") as folder_name:
        folder = Path(folder_name)
        progress("computing the whole model")
        task = VerifyTask(
            model_path=str(gguf.path.absolute()),
            outputs_path=str(folder / "whole.npy"),
            piece_tokens=piece_tokens,
            prompt=prompt,
            n_prefill=n_prefill,
            n_greedy=n_single,
            tokens_path=str(folder / "tokens.npy"),
        )
        start(task, "the whole model")
        whole, tokens = _load_array(folder / "whole.npy"), _load_array(folder / "tokens.npy")
        progress(f"cutting into {len(ranges)} shards")
        _split(model, ranges, folder / "shards")
        n_prompt = len(tokens) - n_single
        cut = _run_shards(start, folder, len(ranges), n_prompt, piece_tokens, progress)
        if cut.shape != whole.shape:
            raise EngineError(f"the cut model gave {cut.shape} logits, the whole {whole.shape}")
        identical, max_abs_diff, greedy_equal = compare_logits(whole, cut)
    return VerifyReport(
        identical=identical,
        max_abs_diff=max_abs_diff,
        greedy_equal=greedy_equal,
        n_layers=gguf.n_layer,
        layer_ranges=tuple((layers.layer_start, layers.layer_end) for layers in ranges),
        n_steps=len(whole),
        architecture=gguf.architecture,
    )


def compare_logits(
    whole: npt.NDArray[np.float32], cut: npt.NDArray[np.float32]
) -> tuple[bool, float, bool]:
    """Same bits or not, largest difference, same choice in each step; both (n_steps, n_vocab).

    Bytes are compared, as NaN differs from itself and 0 equals -0.
    """
    same = whole.view(np.uint32) == cut.view(np.uint32)
    with np.errstate(invalid="ignore"):
        differences = np.abs(whole.astype(np.float64) - cut.astype(np.float64))
    differences = np.nan_to_num(
        np.where(same, 0.0, differences), nan=sys.float_info.max, posinf=sys.float_info.max
    )
    greedy_equal = bool((whole.argmax(axis=1) == cut.argmax(axis=1)).all())
    return bool(same.all()), float(differences.max()), greedy_equal


def _check_inputs(n_shards: int, n_single: int, prompt: str) -> None:
    if n_shards != 1:
        raise InputError(
            "this file is a shard already", next_step="give the model that it was cut from"
        )
    if not 0 <= n_single <= N_SINGLE_STEPS_MAX:
        raise InputError(f"--tokens must be 0 to {N_SINGLE_STEPS_MAX}, not {n_single}")
    if len(prompt) > PROMPT_BYTES_MAX:
        raise InputError(f"the prompt has more than {PROMPT_BYTES_MAX} characters")


def _start(run: RunTask, timeout_s: float, task: VerifyTask, what: str) -> None:
    run(task, what, timeout_s)


def _run_shards(
    start: Callable[[VerifyTask, str], None],
    folder: Path,
    n_shards: int,
    n_prompt: int,
    piece_tokens: int,
    progress: Progress,
) -> npt.NDArray[np.float32]:
    """The logits that come out of the last shard."""
    inputs = folder / "tokens.npy"
    for shard_id in range(n_shards):
        progress(f"computing shard {shard_id + 1} of {n_shards}")
        outputs = folder / f"outputs-{shard_id}.npy"
        task = VerifyTask(
            model_path=str(folder / "shards" / shard_name(shard_id)),
            outputs_path=str(outputs),
            piece_tokens=piece_tokens,
            inputs_path=str(inputs),
            n_prompt=n_prompt,
        )
        start(task, f"shard {shard_id}")
        inputs = outputs
    return _load_array(inputs)


def _split(model: Path, ranges: Sequence[LayerRange], folder: Path) -> None:
    try:
        split_model(model, ranges, folder, name="verify", is_proven=True)
    except InputError as error:
        if error.code == "NO_ROOM":  # nobody has chosen the folder
            error.next_step = "free some space, or set TMPDIR to a folder on another disk"
        raise


def run_task(task: VerifyTask, what: str, timeout_s: float) -> None:
    """Runs one worker to its end; a cancellation kills it.

    Raises the worker's own error, or EngineError (ours) if it died or was too slow.
    """
    command = [sys.executable, "-m", "shardmesh.engine.verify_worker"]
    try:
        ended = subprocess.run(
            command,
            input=msgspec.json.encode(task),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"{what} was not computed within {timeout_s:g} s", next_step="give a longer --timeout"
        ) from error
    except OSError as error:
        raise EngineError(f"cannot start a process for {what}: {error}") from error
    if ended.returncode == EXIT_KNOWN_ERROR:
        failure = msgspec.json.decode(ended.stdout, type=VerifyFailure)
        raise error_from_wire(
            failure.code, failure.blame, f"{what}: {failure.sentence}", failure.next_step
        )
    if ended.returncode != 0:
        raise EngineError(f"{what}: {describe_death(ended.returncode)}", code="ENGINE_DIED")


def describe_death(returncode: int) -> str:
    """How a process ended, in words, from what `subprocess` gives as its return code."""
    if returncode >= 0:
        return f"its process failed with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"its process died inside llama.cpp ({name})"


def _load_array(path: Path) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(path, allow_pickle=False)
    return array
