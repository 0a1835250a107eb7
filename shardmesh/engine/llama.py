"""The engine on llama.cpp: one shard, several sequences, each with a KV cache of its own."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp import llama_cpp as api

from shardmesh.engine import options as choices
from shardmesh.engine.adapters import Adapters
from shardmesh.engine.at_once import computations
from shardmesh.engine.base import (
    Cells,
    EngineInfo,
    EngineOptions,
    Hidden,
    MicroBatch,
    Output,
    SampledToken,
    SamplingSettings,
    TellToken,
)
from shardmesh.engine.llama_batch import LlamaBatch
from shardmesh.engine.llama_model import (
    LoadedModel,
    fingerprint,
    free_model,
    load_model,
    read_facts,
)
from shardmesh.engine.llama_state import SequenceStates
from shardmesh.engine.sampler import SamplerChain
from shardmesh.engine.sampling import describe_choice
from shardmesh.engine.sequences import SequenceTable
from shardmesh.engine.tap import HiddenTap
from shardmesh.engine.vocabulary import SideVocabulary
from shardmesh.engine.watchdog import Watchdog
from shardmesh.errors import EngineError, InputError, ShardmeshError
from shardmesh.memory import memory_free_bytes
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.wire.limits import PIECE_TOKENS_MAX

CANNOT_TRIM = "CANNOT_TRIM"
"""Code of the EngineError when the architecture cannot forget the tail of a sequence."""

_POOLING_OF_LAST = (api.LLAMA_POOLING_TYPE_NONE, api.LLAMA_POOLING_TYPE_LAST)

_ROWS_TO_LEARN = 3

N_BATCH_TOKENS_MAX = PIECE_TOKENS_MAX
"""Rows of one computation; llama.cpp reserves memory for them, and decoding has few."""


def load_engine(
    path: Path, options: EngineOptions, adapters: Mapping[str, Path | None] | None = None
) -> LlamaEngine:
    """Loads a shard, or a whole model, and makes room for its sequences.

    `adapters`: name -> file of the LoRA adapters that a sequence may use, None for one that changes
    nothing in this shard.
    Raises InputError (theirs) for options or a file that cannot be used, EngineError (ours) if
    llama.cpp refuses.
    """
    choices.check_options(options)
    gguf = read_gguf(path)
    facts = read_facts(gguf)
    n_ctx = choices.choose_n_ctx(options, facts.n_ctx_train, facts.kv, memory_free_bytes())
    model = load_model(gguf, facts, n_ctx, options)
    try:
        return LlamaEngine(model, n_ctx, options, Adapters(model.handle, adapters or {}))
    except BaseException:
        free_model(model)
        raise


class LlamaEngine:
    """See `engine.base.Engine`."""

    def __init__(
        self, model: LoadedModel, n_ctx: int, options: EngineOptions, adapters: Adapters
    ) -> None:
        """Takes over `model` and frees it in `close`; if this raises, it is still the caller's."""
        facts = model.facts
        self.watchdog = Watchdog()
        self._model = model
        self._info = EngineInfo(
            architecture=facts.architecture,
            is_first=facts.is_first,
            is_last=facts.is_last,
            n_layer=model.n_layer,
            n_layer_model=facts.n_layer_model,
            n_embd=model.n_embd * facts.n_streams,
            n_vocab=model.n_vocab,
            n_ctx=n_ctx,
            n_parallel=options.n_parallel,
            n_batch_tokens_max=min(N_BATCH_TOKENS_MAX, n_ctx * options.n_parallel),
            fingerprint=fingerprint(facts, n_ctx, options),
            adapters=adapters.names,
        )
        self._context: Any = None
        self._samplers: dict[int, SamplerChain] = {}
        self._vocabulary = SideVocabulary(options.vocabulary_path, model.n_vocab)
        n_rows_max = self._info.n_batch_tokens_max
        self._tap = None
        if facts.input_node or facts.factors or not facts.is_last:
            self._tap = HiddenTap(
                self._info.n_embd,
                n_rows_max,
                output_node="" if facts.is_last else f"{facts.output_node}-{model.n_layer - 1}",
                input_node=facts.input_node,
                factors=facts.factors,
            )
        self._batch = LlamaBatch(
            n_rows_max,
            0 if facts.is_first or facts.fed_as_tokens else model.n_embd_input,
            has_sections=model.has_rope_sections,
        )
        self._adapters = adapters
        self._adapter_of: dict[int, str] = {}
        self._table = SequenceTable(self._info)
        self._context = self._open_context(options)
        self._gives_embeddings = False  # the default of llama.cpp
        self._states = SequenceStates(self._context, options.n_parallel)
        self._pooling = api.llama_pooling_type(self._context)

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
        self._require_open()
        self._table.check_keep(sequence, n_keep)
        self._adapters.check(adapter)
        self.close_sequence(sequence, n_keep)
        sampler = None
        if sampling is not None and self._info.is_last:
            sampler = SamplerChain(
                sampling, self._info.n_vocab, history, self._vocabulary, self.watchdog
            )
        self._table.open(sequence, can_sample=sampler is not None, n_keep=n_keep)
        self._adapter_of[sequence] = adapter
        if sampler is not None:
            self._samplers[sequence] = sampler

    def compute(
        self, batch: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        self._require_open()
        self._table.check(batch)
        self._check_embeddings(batch)
        try:
            is_single = len(batch) == 1
            outputs = self._run(batch, tell_token) if is_single else self._run_all(batch)
        except BaseException:
            self._table.damage(batch)
            raise
        self._table.advance(batch)
        for micro, output in zip(batch, outputs, strict=True):
            if output.failure is not None:
                self._table.damage([micro])
                if is_single:
                    raise output.failure
        return outputs

    def _run_all(self, batch: Sequence[MicroBatch]) -> list[Output]:
        """As few computations as change no bit, in order."""
        return [
            output
            for adapter, same in itertools.groupby(batch, self._adapter_name)
            for part in computations(list(same), self._numbers_at_once(adapter))
            for output in self._run(part)
        ]

    def _numbers_at_once(self, adapter: str) -> Sequence[int]:
        """None with an adapter: its own weights were not part of what was tried at loading."""
        return () if adapter else self._info.numbers_at_once

    def _adapter_name(self, micro: MicroBatch) -> str:
        return self._adapter_of.get(micro.sequence, "")

    def join_sequences(self, numbers: Sequence[int]) -> None:
        """See `engine.at_once`."""
        self._info = dataclasses.replace(self._info, numbers_at_once=tuple(sorted(numbers)))

    def learn_cells(self) -> None:
        """Finds out whether KV can be copied, by computing some rows in an empty engine."""
        n_rows = min(_ROWS_TO_LEARN, self._info.n_ctx)
        tokens = tuple(range(n_rows)) if self._info.is_first else None
        generator = np.random.default_rng(0)
        rows = generator.standard_normal((n_rows, self._info.n_embd), dtype=np.float32)
        hidden = None if self._info.is_first else rows
        self.open_sequence(0)
        try:
            self.compute([MicroBatch(sequence=0, position=0, tokens=tokens, hidden=hidden)])
            cell_bytes = self._states.learn(0, n_rows)
        except EngineError:
            cell_bytes = 0  # random rows can be too much for a model
        finally:
            self.close_sequence(0)
        self._info = dataclasses.replace(self._info, cell_bytes=cell_bytes)

    def n_held(self, sequence: int) -> int:
        return self._table.n_held(sequence)

    def trim_sequence(self, sequence: int, n_keep: int) -> None:
        self._require_open()
        self._table.check_trim(sequence, n_keep)
        self._forget_tail(sequence, n_keep)
        self._table.trim(sequence, n_keep)

    def close_sequence(self, sequence: int, n_keep: int = 0) -> None:
        self._require_open()
        sampler = self._samplers.pop(sequence, None)
        if sampler is not None:
            sampler.close()
        if n_keep:
            self._forget_tail(sequence, n_keep)
        else:
            api.llama_memory_seq_rm(api.llama_get_memory(self._context), sequence, -1, -1)
        self._table.close(sequence, n_keep)

    def copy_sequence(self, source: int, target: int) -> None:
        self._require_open()
        self._table.copy(source, target)
        # From one cache to another llama.cpp copies the whole, and that before it next computes.
        api.llama_memory_seq_cp(api.llama_get_memory(self._context), source, target, -1, -1)

    def read_cells(self, sequence: int, start: int, end: int) -> Cells:
        self._require_open()
        self._table.check_read(sequence, start, end)
        return self._states.read(sequence, start, end)

    def write_cells(self, sequence: int, cells: Cells) -> None:
        self._require_open()
        self._table.check_cells(sequence, cells.shape, self._info.cell_bytes)
        self.close_sequence(sequence)
        self._states.write(sequence, cells)
        self._table.write(sequence, len(cells))

    def _forget_tail(self, sequence: int, n_keep: int) -> None:
        memory = api.llama_get_memory(self._context)
        if not api.llama_memory_seq_rm(memory, sequence, n_keep, -1):
            raise EngineError(
                f"{self._info.architecture} cannot forget the tail of a sequence",
                code=CANNOT_TRIM,
                next_step="start the sequence again from its first token",
            )

    def close(self) -> None:
        if self._context is None:
            return
        for sampler in self._samplers.values():
            sampler.close()
        self._samplers.clear()
        self._vocabulary.close()
        api.llama_free(self._context)
        self._context = None
        free_model(self._model)

    def _open_context(self, options: EngineOptions) -> Any:
        params = api.llama_context_default_params()
        params.n_ctx = self._info.n_ctx * self._info.n_parallel
        params.n_seq_max = self._info.n_parallel
        # One part for each computation: rows stay in the order of the batch.
        params.n_batch = params.n_ubatch = self._info.n_batch_tokens_max
        # One cache for each sequence: in a common one the place of a sequence's cells depends on
        # the others, and with it the order of sums and the last bits.
        params.kv_unified = False
        params.swa_full = True  # else the tail of a sequence could not be trimmed
        params.n_threads = params.n_threads_batch = choices.choose_n_threads(options)
        params.type_k = choices.CACHE_TYPES[options.cache_type_k].ggml_type
        params.type_v = choices.CACHE_TYPES[options.cache_type_v].ggml_type
        params.flash_attn_type = int(choices.choose_flash_attention(options))
        params.offload_kqv = params.op_offload = options.n_gpu_layers != 0
        params.yarn_orig_ctx = self._model.facts.n_ctx_original  # see `load_model`; 0: the file's
        params.no_perf = True
        if self._tap is not None:
            params.cb_eval = self._tap.callback
            params.cb_eval_user_data = self._tap.user_data
        context = api.llama_init_from_model(self._model.handle, params)
        if not context:
            raise EngineError(
                f"llama.cpp could not set up {params.n_ctx} tokens of context",
                code="CONTEXT_NOT_MADE",
                next_step="use a smaller --ctx-size or --parallel, or another --cache-type",
            )
        return context

    def _require_open(self) -> None:
        if self._context is None:
            raise EngineError("the engine is closed")

    def _run(
        self, micros: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        """One computation."""
        is_last = self._info.is_last
        self._adapters.use(self._context, self._adapter_name(micros[0]))
        if self._tap is not None:
            self._tap.start([micro.hidden for micro in micros if micro.hidden is not None])
        wants_embedding = is_last and micros[0].want_embedding
        rows = self._batch.fill(micros, output_all=wants_embedding or not is_last)
        self._give_embeddings(wants_embedding)
        status = api.llama_decode(self._context, rows)
        if status != 0:
            raise EngineError(f"llama.cpp could not compute a batch (llama_decode: {status})")
        if self._tap is not None and not is_last:
            return _outputs_of(micros, self._tap.take(rows.n_tokens).copy())
        if self._tap is not None:
            self._tap.check()
        ends = itertools.accumulate(micro.n_tokens for micro in micros)
        return [
            self._outcome(micro, end - 1, tell_token)
            for micro, end in zip(micros, ends, strict=True)
        ]

    def _scores(self, micro: MicroBatch, first_row: int) -> tuple[SampledToken, ...]:
        """How likely the tokens are that follow the first rows of a micro-batch."""
        n_top = self._samplers[micro.sequence].settings.n_top_logprobs if micro.scored else 0
        return tuple(
            describe_choice(self._logits(row), token, n_top)
            for row, token in enumerate(micro.scored, start=first_row)
        )

    def _give_embeddings(self, wanted: bool) -> None:
        if wanted != self._gives_embeddings:
            api.llama_set_embeddings(self._context, wanted)
            self._gives_embeddings = wanted

    def _outcome(self, micro: MicroBatch, row: int, tell_token: TellToken | None) -> Output:
        """What fails for one micro-batch is nothing to those computed together with it."""
        try:
            return self._finish(micro, row, tell_token)
        except ShardmeshError as error:
            return Output(failure=error)

    def _finish(self, micro: MicroBatch, row: int, tell_token: TellToken | None) -> Output:
        """What the last stage gives for a micro-batch whose last row is `row`."""
        if micro.want_embedding:
            return Output(embedding=self._embedding(micro.sequence, row))
        scores = self._scores(micro, row + 1 - micro.n_tokens)
        if not (micro.sample or micro.want_logits):
            return Output(scores=scores)
        logits = self._logits(row)
        sampled = None
        if micro.sample:
            sampler = self._samplers[micro.sequence]
            token = sampler.sample(self._context, row, logits)
            if tell_token is not None:
                tell_token(token)
            sampled = describe_choice(logits, token, sampler.settings.n_top_logprobs)
        return Output(
            sampled=sampled, logits=logits.copy() if micro.want_logits else None, scores=scores
        )

    def _check_embeddings(self, batch: Sequence[MicroBatch]) -> None:
        """Raises InputError (theirs) for what the model's kind of pooling cannot do."""
        if not self._info.is_last or not any(micro.want_embedding for micro in batch):
            return
        if self._pooling == api.LLAMA_POOLING_TYPE_RANK:
            raise InputError("this model ranks texts; it has no embeddings", code="NO_EMBEDDINGS")
        for micro in batch:
            if micro.want_embedding and (micro.sample or micro.want_logits):
                raise InputError("a micro-batch gives either an embedding or a token")
            if micro.want_embedding and micro.position and self._pooling not in _POOLING_OF_LAST:
                raise InputError(
                    f"this model's embeddings are of at most {self._info.n_batch_tokens_max}"
                    " tokens: all are pooled at once",
                    code="PROMPT_TOO_LONG",
                    next_step="cut the text into parts",
                )

    def _embedding(self, sequence: int, row: int) -> npt.NDArray[np.float32]:
        """As llama.cpp pools the rows of this computation; without pooling the last of them."""
        if self._pooling == api.LLAMA_POOLING_TYPE_NONE:
            pointer = api.llama_get_embeddings_ith(self._context, row)
        else:
            pointer = api.llama_get_embeddings_seq(self._context, sequence)
        if not pointer:
            raise EngineError("llama.cpp gave no embedding")
        width = int(api.llama_model_n_embd_out(self._model.handle))
        embedding = np.ctypeslib.as_array(pointer, shape=(width,)).copy()
        if not np.isfinite(embedding).all():
            raise EngineError("the model computed an embedding that is not numbers")
        return embedding

    def _logits(self, row: int) -> npt.NDArray[np.float32]:
        """llama.cpp's own memory, (n_vocab,), valid until the next computation."""
        pointer = api.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise EngineError(f"llama.cpp gave no logits for row {row}")
        logits = np.ctypeslib.as_array(pointer, shape=(self._info.n_vocab,))
        if not np.isfinite(logits.max()):  # the samplers would abort on these
            raise EngineError("the model computed logits that are not numbers")
        return logits


def _outputs_of(micros: Sequence[MicroBatch], hidden: Hidden) -> list[Output]:
    """The rows of each micro-batch, in order."""
    if len(micros) == 1:
        return [Output(hidden=hidden)]
    ends = list(itertools.accumulate(micro.n_tokens for micro in micros))
    starts = (0, *ends[:-1])
    return [Output(hidden=hidden[s:e]) for s, e in zip(starts, ends, strict=True)]
