"""An engine without a model, for tests and simulation: a hash instead of a transformer.

A row of hidden states is `n_embd` whole numbers below 2**24, which float32 holds exactly.  Each
layer hashes its number, the position, the row it gets and the row that it gave for the position
before, so that a row depends on every token so far; one that is lost, doubled, swapped or taken
from another sequence changes all that follows.  A chain of fakes gives the tokens of one whole
fake.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import struct
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from shardmesh.engine.base import (
    Cells,
    EngineInfo,
    MicroBatch,
    Output,
    SampledToken,
    SamplingSettings,
    TellToken,
)
from shardmesh.engine.sampling import check_sampling, describe_choice
from shardmesh.engine.sequences import SequenceTable
from shardmesh.engine.watchdog import Watchdog

_ROW_MASK = (1 << 24) - 1
_LOGIT_SCALE = 4096.0


def fake_info(
    layer_start: int = 0,
    layer_end: int = 4,
    n_layer: int = 4,
    *,
    n_embd: int = 8,
    n_vocab: int = 64,
    n_ctx: int = 256,
    n_parallel: int = 4,
    n_batch_tokens_max: int = 64,
) -> EngineInfo:
    """The info of a fake stage for `[layer_start, layer_end)` of a model of `n_layer` layers."""
    is_first, is_last = layer_start == 0, layer_end == n_layer
    return EngineInfo(
        architecture="fake",
        is_first=is_first,
        is_last=is_last,
        n_layer=layer_end - layer_start,
        n_layer_model=n_layer,
        n_embd=n_embd,
        n_vocab=n_vocab if is_first or is_last else 0,
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        n_batch_tokens_max=n_batch_tokens_max,
        fingerprint="fake-1",
        cell_bytes=(layer_end - layer_start) * n_embd * 4,
    )


@dataclasses.dataclass
class _Sequence:
    rows: list[list[bytes]]  # of each layer, the row given for each position
    sampling: SamplingSettings | None
    n_drawn: int = 0


class FakeEngine:
    """The deterministic fake; see the module and `engine.base.Engine`.

    `before_compute` is called with the number of rows: a test may wait or raise there.
    """

    def __init__(
        self,
        info: EngineInfo,
        *,
        layer_start: int = 0,
        before_compute: Callable[[int], None] | None = None,
    ) -> None:
        self.watchdog = Watchdog()
        self._info = info
        self._layer_start = layer_start
        self._before_compute = before_compute
        self._table = SequenceTable(info)
        self._sequences: dict[int, _Sequence] = {}

    @property
    def info(self) -> EngineInfo:
        return self._info

    def open_sequence(
        self,
        sequence: int,
        sampling: SamplingSettings | None = None,
        history: Sequence[int] = (),
        adapter: str = "",
        n_keep: int = 0,
    ) -> None:
        if sampling is not None and self._info.is_last:
            check_sampling(sampling, self._info.n_vocab)
        self._table.open(sequence, can_sample=sampling is not None, n_keep=n_keep)
        self._sequences[sequence] = _Sequence(self._rows_of(sequence, n_keep), sampling)

    def compute(
        self, batch: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        self._table.check(batch)
        try:
            if self._before_compute is not None:
                self._before_compute(sum(micro.n_tokens for micro in batch))
        except Exception:
            self._table.damage(batch)
            raise
        outputs = [self._compute_one(micro) for micro in batch]
        self._table.advance(batch)
        if tell_token is not None and len(outputs) == 1 and outputs[0].sampled is not None:
            tell_token(outputs[0].sampled.token)
        return outputs

    def n_held(self, sequence: int) -> int:
        return self._table.n_held(sequence)

    def trim_sequence(self, sequence: int, n_keep: int) -> None:
        self._table.trim(sequence, n_keep)
        for rows in self._sequences[sequence].rows:
            del rows[n_keep:]

    def close_sequence(self, sequence: int, n_keep: int = 0) -> None:
        self._table.close(sequence, n_keep)
        kept = self._rows_of(sequence, self._table.n_held(sequence))
        self._sequences[sequence] = _Sequence(kept, None)

    def copy_sequence(self, source: int, target: int) -> None:
        self._table.copy(source, target)
        n_held = self._table.n_held(source)
        self._sequences[target] = _Sequence(self._rows_of(source, n_held), None)

    def read_cells(self, sequence: int, start: int, end: int) -> Cells:
        self._table.check_read(sequence, start, end)
        layers = self._sequences[sequence].rows
        data = b"".join(given[i] for i in range(start, end) for given in layers)
        return np.frombuffer(data, dtype=np.uint8).reshape(end - start, self._info.cell_bytes)

    def write_cells(self, sequence: int, cells: Cells) -> None:
        self._table.check_cells(sequence, cells.shape, self._info.cell_bytes)
        by_layer = cells.reshape(len(cells), self._info.n_layer, -1).transpose(1, 0, 2)
        rows = [[row.tobytes() for row in layer] for layer in by_layer]
        self._sequences[sequence] = _Sequence(rows, None)
        self._table.write(sequence, len(cells))

    def _rows_of(self, sequence: int, n_rows: int) -> list[list[bytes]]:
        """A copy of what each layer gave for the first positions."""
        held = self._sequences.get(sequence)
        layers = held.rows if held else [[] for _ in range(self._info.n_layer)]
        return [given[:n_rows] for given in layers]

    def close(self) -> None:
        for sequence in list(self._sequences):
            self.close_sequence(sequence)

    def _compute_one(self, micro: MicroBatch) -> Output:
        rows = self._input_rows(micro)
        state = self._sequences[micro.sequence]
        for layer, given in enumerate(state.rows, start=self._layer_start):
            for i, row in enumerate(rows):
                before = given[-1] if given else b""
                label = struct.pack("<II", layer, micro.position + i)
                given.append(self._hash_row(label + before + row))
            rows = given[-len(rows) :]
        if self._info.is_last and micro.want_embedding:
            return Output(embedding=np.frombuffer(rows[-1], dtype=np.float32).copy())
        if not self._info.is_last:
            hidden = np.frombuffer(b"".join(rows), dtype=np.float32)
            return Output(hidden=hidden.reshape(len(rows), self._info.n_embd).copy())
        n_top = state.sampling.n_top_logprobs if state.sampling else 0
        scores = tuple(
            describe_choice(self._logits(row), token, n_top)
            for row, token in zip(rows, micro.scored, strict=False)
        )
        logits = self._logits(rows[-1])
        sampled = self._sample(logits, state) if micro.sample else None
        return Output(sampled=sampled, logits=logits if micro.want_logits else None, scores=scores)

    def _input_rows(self, micro: MicroBatch) -> list[bytes]:
        if micro.hidden is not None:
            return [row.tobytes() for row in micro.hidden]
        return [self._hash_row(b"token" + struct.pack("<I", t)) for t in micro.tokens or ()]

    def _hash_row(self, data: bytes) -> bytes:
        """The bytes of one row: n_embd float32 with whole numbers below 2**24."""
        numbers = _hash_numbers(data, self._info.n_embd) & _ROW_MASK
        return numbers.astype(np.float32).tobytes()

    def _logits(self, row: bytes) -> npt.NDArray[np.float32]:
        numbers = _hash_numbers(b"logits" + row, self._info.n_vocab) & 0xFFFF
        return (numbers / _LOGIT_SCALE).astype(np.float32)

    def _sample(self, logits: npt.NDArray[np.float32], state: _Sequence) -> SampledToken:
        """Greedy, or a draw by the Gumbel-max rule with hashed noise; other filters are ignored."""
        settings = state.sampling or SamplingSettings()
        scores = logits.astype(np.float64)
        for token, bias in settings.logit_bias:
            scores[token] += bias
        if settings.temperature > 0:
            label = struct.pack("<QQ", settings.seed, state.n_drawn)
            uniform = (_hash_numbers(b"noise" + label, scores.size) + 0.5) / 2**32
            scores = scores / settings.temperature - np.log(-np.log(uniform))
        state.n_drawn += 1
        return describe_choice(logits, int(scores.argmax()), settings.n_top_logprobs)


def fake_chain(
    boundaries: Sequence[int] = (0, 2, 4), *, n_vocab: int = 64, n_ctx: int = 256
) -> list[FakeEngine]:
    """Fakes for consecutive stages, cut at the given layers; (0, n) is the whole model."""
    return [
        FakeEngine(
            fake_info(start, end, boundaries[-1], n_vocab=n_vocab, n_ctx=n_ctx), layer_start=start
        )
        for start, end in itertools.pairwise(boundaries)
    ]


def _hash_numbers(data: bytes, n: int) -> npt.NDArray[np.uint32]:
    """`n` evenly spread 32-bit numbers."""
    return np.frombuffer(hashlib.shake_128(data).digest(4 * n), dtype="<u4")
