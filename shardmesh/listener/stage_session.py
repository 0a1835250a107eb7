"""What a stage knows of its sessions, and the pure decisions about them."""

from __future__ import annotations

import dataclasses

import trio

from shardmesh.engine.base import EngineInfo, MicroBatch, Output, SamplingSettings
from shardmesh.errors import BusyError, InputError, ShardmeshError
from shardmesh.links.link import Link
from shardmesh.wire.messages import (
    BatchDone,
    HiddenBatch,
    Message,
    OpenSession,
    Sampled,
    SessionFailed,
    StageTiming,
    hidden_to_body,
)

SENTENCE_LENGTH_MAX = 1000  # characters; TEXT_BYTES_MAX with room for four bytes each


@dataclasses.dataclass(frozen=True)
class StageIdentity:
    """What the stage serves; a session for anything else is refused."""

    manifest_digest: str
    layer_start: int
    layer_end: int


@dataclasses.dataclass(eq=False)
class StageSession:
    """One session on this stage."""

    opened_by: OpenSession
    sequence: int
    coordinator: Link
    next_link: Link | None = None
    n_received: int = 0  # the position that must come next
    connecting: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)


@dataclasses.dataclass(frozen=True)
class Work:
    """A micro-batch that waits for the engine, with what its result needs."""

    session: StageSession
    batch: MicroBatch
    timings: tuple[StageTiming, ...]
    received_s: float


@dataclasses.dataclass
class StageCounters:
    """What GET_METRICS and /metrics/1.0 tell of a stage."""

    n_sessions_opened: int = 0
    n_sessions_failed: int = 0
    n_sessions_refused: int = 0
    n_batches: int = 0
    n_tokens: int = 0
    n_late_frames: int = 0
    queue_us: int = 0
    compute_us: int = 0


def check_request(
    message: OpenSession, serves: StageIdentity, info: EngineInfo, n_free_sequences: int
) -> None:
    """Raises InputError (theirs) or BusyError (the moment's) unless the session can be opened."""
    if StageIdentity(message.manifest_digest, message.layer_start, message.layer_end) != serves:
        raise InputError("this node serves another shard now", code="WRONG_SHARD")
    if message.adapter and message.adapter not in info.adapters:
        raise InputError(
            f"this node has no LoRA adapter named {message.adapter[:64]}",
            code="NO_ADAPTER",
            next_step="use one of the model's manifest, whose files must lie beside the shard",
        )
    fits = (
        info.is_first == (message.previous_stage is None)
        and info.is_last == (message.next_stage is None)
        and info.is_last == (message.sampling is not None)
    )
    if not fits:
        raise InputError("the chain and this stage do not fit together", code="WRONG_CHAIN")
    if message.n_ctx > info.n_ctx:
        raise InputError(
            f"{message.n_ctx} tokens of context were asked for, this node has {info.n_ctx}",
            code="CONTEXT_TOO_LONG",
            next_step="shorten the prompt, ask for fewer tokens, or raise --ctx-size",
        )
    if n_free_sequences == 0:
        raise BusyError(
            f"all {info.n_parallel} sequences of this node are in use",
            next_step="try again shortly, or raise --parallel",
        )


def sampling_settings(message: OpenSession) -> SamplingSettings | None:
    """The engine's settings for the session; None on stages that do not sample."""
    if message.sampling is None:
        return None
    fields = message.sampling.__struct_fields__
    return SamplingSettings(**{name: getattr(message.sampling, name) for name in fields})


def result_message(
    work: Work, output: Output, timings: tuple[StageTiming, ...]
) -> tuple[Message, bytes | memoryview]:
    """What goes on: hidden states to the next stage, or word to the coordinator."""
    opened_by, batch = work.session.opened_by, work.batch
    if output.hidden is not None:
        n_tokens, n_embd = output.hidden.shape
        hidden_batch = HiddenBatch(
            session=opened_by.session,
            epoch=opened_by.epoch,
            position=batch.position,
            n_tokens=n_tokens,
            n_embd=n_embd,
            dtype="f32",
            sample=batch.sample,
            timings=timings,
            embed=batch.want_embedding,
        )
        return hidden_batch, hidden_to_body(output.hidden)
    chosen = output.sampled
    done = BatchDone(
        session=opened_by.session,
        epoch=opened_by.epoch,
        position=batch.position,
        n_tokens=batch.n_tokens,
        sampled=None if chosen is None else Sampled(**dataclasses.asdict(chosen)),
        timings=timings,
        embedding=b"" if output.embedding is None else output.embedding.astype("<f4").tobytes(),
    )
    return done, b""


def failure_message(opened_by: OpenSession, error: ShardmeshError) -> SessionFailed:
    """Word to the coordinator that the session is over on this stage."""
    return SessionFailed(
        session=opened_by.session,
        epoch=opened_by.epoch,
        layer_start=opened_by.layer_start,
        layer_end=opened_by.layer_end,
        code=error.code,
        blame=error.blame,
        message=str(error)[:SENTENCE_LENGTH_MAX],
        next_step=error.next_step[:SENTENCE_LENGTH_MAX],
    )
