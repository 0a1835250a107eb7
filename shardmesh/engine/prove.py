"""Whether a model of an unknown architecture stays exact when cut: tried before it is believed.

The model itself is computed whole and cut, if there is memory for it, else a shorter model of its
first layers.  Both run in processes of their own, as llama.cpp may end them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from shardmesh.engine.verify import Progress, RunTask, verify_model
from shardmesh.errors import GgufError, ShardmeshError
from shardmesh.memory import memory_free_bytes
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.shards.gguf_write import n_bytes_of, write_contents
from shardmesh.shards.layers import LayerRange, ranges_of_counts
from shardmesh.shards.legal_cuts import legal_cuts
from shardmesh.shards.piece_tokens import AUTO
from shardmesh.shards.slices import first_layers
from shardmesh.shards.split import piece_tokens_for

N_PREFILL_MIN: Final = 48
N_PREFILL_MAX: Final = 4096 + 64
"""Past the widest usual sliding window."""

N_SINGLE: Final = 4
N_LAYERS_TRIED: Final = (8, 6, 4, 3)
"""Of a shorter model; three have a stage in the middle."""

MEMORY_SHARE: Final = 0.6
"""Of the free memory that the weights may take."""

TIMEOUT_S: Final = 3600.0


def prove_exact(
    source: GgufFile,
    ranges: Sequence[LayerRange],
    *,
    progress: Progress,
    piece_tokens: int | None = AUTO,
    n_bytes_free: int | None = None,
    run: RunTask | None = None,
) -> None:
    """Raises GgufError (theirs) unless chains of these ranges give the bits of the whole model.

    `progress` gets a line before each part; `piece_tokens` is what the model is to be split with;
    `n_bytes_free` is the free memory (None: look).
    """
    room = int(MEMORY_SHARE * (memory_free_bytes() if n_bytes_free is None else n_bytes_free))
    n_prefill = prefill_length(source)
    piece_tokens = piece_tokens_for(source, len(ranges), piece_tokens)
    if source.n_bytes <= room:
        _prove(source.path, source, ranges, n_prefill, piece_tokens, progress, run)
        return
    n_layer = _fitting(source, room)
    with tempfile.TemporaryDirectory(prefix="shardmesh-prove-") as folder:
        path = Path(folder) / "first-layers.gguf"
        progress(f"writing a model of the first {n_layer} layers")
        with path.open("xb") as file:
            write_contents(file, first_layers(source, n_layer))
        cuts = legal_cuts(source).of_first(n_layer)
        tried = cuts.nearest(ranges_of_counts([1, n_layer - 2, 1]))
        tried = tried or cuts.nearest(ranges_of_counts([n_layer // 2, n_layer - n_layer // 2]))
        if tried is None:
            raise _refused(source, "its first layers cannot be cut by themselves")
        _prove(path, source, tried, n_prefill, piece_tokens, progress, run)


def prefill_length(source: GgufFile) -> int:
    """Tokens to try with: past the model's sliding window, if its context goes so far."""
    prefix = source.architecture
    window = source.metadata.get(f"{prefix}.attention.sliding_window")
    widest = max((int(n) for n in window.items()), default=0) if window is not None else 0
    n_ctx = source.get_int(f"{prefix}.context_length", N_PREFILL_MIN + N_SINGLE)
    wanted = max(N_PREFILL_MIN, widest + 16)
    return max(1, min(wanted, N_PREFILL_MAX, n_ctx - N_SINGLE))


def _prove(
    path: Path,
    source: GgufFile,
    ranges: Sequence[LayerRange],
    n_prefill: int,
    piece_tokens: int,
    progress: Progress,
    run: RunTask | None,
) -> None:
    try:
        report = verify_model(
            path,
            ranges,
            n_single=N_SINGLE,
            prompt="",
            timeout_s=TIMEOUT_S,
            progress=progress,
            n_prefill=n_prefill,
            piece_tokens=piece_tokens,
            run=run,
        )
    except ShardmeshError as error:
        raise _refused(source, str(error)) from error
    if not report.identical:
        raise _refused(source, f"the logits differ by up to {report.max_abs_diff:g}")


def _fitting(source: GgufFile, room: int) -> int:
    """The most layers that there is memory for; raises GgufError (theirs)."""
    for n_layer in N_LAYERS_TRIED:
        if n_layer < source.n_layer and n_bytes_of(first_layers(source, n_layer)) <= room:
            return n_layer
    raise _refused(source, "there is no memory to try it, not even with its first three layers")


def _refused(source: GgufFile, why: str) -> GgufError:
    return GgufError(
        f"architecture {source.architecture[:64]!r} is not among those that are known to stay exact"
        f" when cut, and this model could not be shown to: {why}",
        code="GGUF_ARCHITECTURE",
        next_step="run it whole on one machine, or use a model of docs/architectures.md",
    )
