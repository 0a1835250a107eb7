"""What a stage knows of its sessions, and the pure decisions about them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import Literal

import msgspec
import trio

from shardmesh.engine.base import (
    EngineInfo,
    Hidden,
    MicroBatch,
    Output,
    SampledToken,
    SamplingSettings,
)
from shardmesh.errors import BusyError, InputError, ProtocolError, ShardmeshError
from shardmesh.links.link import Link
from shardmesh.links.outgoing import Outgoing
from shardmesh.listener.copying import CopyOut, n_final
from shardmesh.listener.drafts import DraftChecks
from shardmesh.listener.handed import HandedTokens
from shardmesh.listener.kept_sequences import Place, Prefix, held_of
from shardmesh.wire.error_report import told
from shardmesh.wire.hidden_states import EXACT, body_to_hidden, hidden_to_body
from shardmesh.wire.limits import REPLAY_KEPT_BYTES_MAX, REPLAY_RESULTS_KEPT_MAX
from shardmesh.wire.messages import (
    BatchDone,
    BatchTaken,
    HiddenBatch,
    HopFailed,
    NextStage,
    OpenSession,
    RepairSession,
    Sampled,
    SessionFailed,
    StageTiming,
    StandBy,
    TokenBatch,
)


@dataclasses.dataclass(frozen=True)
class StageIdentity:
    """What the stage serves; a session for anything else is refused."""

    manifest_digest: str
    layer_start: int
    layer_end: int


@dataclasses.dataclass(eq=False)
class StageSession:
    """One session on this stage; opened once, repaired as often as its neighbours change."""

    opened_by: OpenSession
    sequence: int
    coordinator: Link
    outgoing: Outgoing
    epoch: int
    previous_stage: str | None  # peer id; None on the first stage, which the coordinator feeds
    next_stage: NextStage | None  # None on the last stage, which reports to the coordinator
    first_stage: NextStage | None  # on the last stage: where it may hand tokens on
    last_stage: str | None  # on the first stage: peer id of who may hand tokens on to it
    checks: DraftChecks  # used on the last stage, in the worker's thread
    previous_link: Link | None = None  # where micro-batches came from last
    next_link: Link | None = None
    first_link: Link | None = None  # where tokens are handed on, if that is possible now
    handed: HandedTokens = dataclasses.field(default_factory=HandedTokens)
    may_be_handed: bool = False  # what is sampled behind the newest micro-batch
    branch: int = 0  # the newest that came
    n_received: int = 0  # the position that must come next
    n_before_repair: int | None = None  # positions computed before the first one
    n_replay: int = 0  # positions below are acknowledged to the previous hop
    n_acknowledged: int = 0  # in this epoch
    is_deaf: bool = False  # the previous hop was reported: nothing of it counts in this epoch
    connecting: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)
    first_sampled: int | None = None  # position of the first micro-batch sampled, on the last stage
    copy: CopyOut | None = None  # to a standby

    @property
    def n_copyable(self) -> int:
        """Positions that are of use to a standby."""
        return n_final(self.n_received, self.first_sampled)

    @property
    def session_id(self) -> bytes:
        return self.opened_by.session

    @property
    def held_prefix(self) -> Prefix:
        """What it has of its prompt, for sessions that begin alike.

        The names stand for the stages before it as well, which may be others after a repair.
        """
        n_computed = self.outgoing.n_computed
        if self.n_before_repair is not None:
            n_computed = min(n_computed, self.n_before_repair)
        return held_of(self.opened_by.prefix, n_computed)

    def takes_handed(self, message: TokenBatch, n_vocab: int) -> bool:
        """Whether to compute a token that the last stage handed on to this first one."""
        return self.may_be_handed and self.handed.take(
            message,
            n_received=self.n_received,
            branch=self.branch,
            n_ctx=self.opened_by.n_ctx,
            n_vocab=n_vocab,
        )

    def acknowledge(self) -> None:
        """In a replay: lets the previous hop send more, once what came is dealt with."""
        if self.n_acknowledged >= self.n_replay:
            return
        n_taken, link = self.outgoing.n_done, self.previous_link
        if link is None or self.n_acknowledged >= n_taken:
            return
        self.n_acknowledged = n_taken
        taken = BatchTaken(session=self.session_id, epoch=self.epoch, n_taken=n_taken)
        with contextlib.suppress(ShardmeshError):  # its end is noticed by the link itself
            link.send(taken)

    def move_to(self, message: RepairSession) -> None:
        """Stops sending and takes frames of the new epoch only, from the new neighbours."""
        if self.n_before_repair is None:
            self.n_before_repair = self.outgoing.n_computed
        self.connecting.cancel()
        self.connecting = trio.CancelScope()
        self.outgoing.hold(message.epoch)
        self.epoch = message.epoch
        self.previous_stage, self.next_stage = message.previous_stage, message.next_stage
        self.first_stage, self.last_stage = message.first_stage, message.last_stage
        self.previous_link = self.next_link = self.first_link = None
        self.handed.forget_from(0)
        self.may_be_handed = False
        self.n_replay = self.n_acknowledged = 0
        self.is_deaf = False


def new_session(message: OpenSession, place: Place, link: Link, info: EngineInfo) -> StageSession:
    """A session whose sequence is reserved; it sends nothing before its first hop is known."""
    outgoing = Outgoing(
        message.epoch,
        n_bytes_max=REPLAY_KEPT_BYTES_MAX // info.n_parallel,
        n_kept_max=REPLAY_RESULTS_KEPT_MAX if info.is_last else None,
        start=place.n_held,
    )
    return StageSession(
        opened_by=message,
        sequence=place.sequence,
        coordinator=link,
        outgoing=outgoing,
        epoch=message.epoch,
        previous_stage=message.previous_stage,
        next_stage=message.next_stage,
        first_stage=message.first_stage,
        last_stage=message.last_stage,
        checks=DraftChecks(message.draft_key),
        n_received=place.n_held,
    )


class Work(msgspec.Struct, frozen=True):
    """A micro-batch that waits for the engine, with what its result needs."""

    session: StageSession
    batch: MicroBatch
    epoch: int  # the one in which it came
    branch: int
    check: bytes
    hand: bool
    timings: tuple[StageTiming, ...]
    received_s: float


@dataclasses.dataclass
class StageCounters:
    """What GET_METRICS and /metrics/1.0 tell of a stage."""

    n_sessions_opened: int = 0
    n_sessions_failed: int = 0
    n_sessions_refused: int = 0
    n_sessions_repaired: int = 0
    n_batches: int = 0
    n_tokens: int = 0
    n_late_frames: int = 0
    queue_us: int = 0
    compute_us: int = 0
    token_us: int = 0  # computing one token, of late
    n_tokens_reused: int = 0  # of prompts, which were there already
    n_tokens_handed: int = 0  # that came straight from a last stage
    n_sequences_kept: int = 0  # free ones that hold a prompt, now
    n_copies_used: int = 0  # sessions that went on behind what was kept as a standby


def check_request(
    message: OpenSession, serves: StageIdentity, info: EngineInfo, n_free_sequences: int
) -> None:
    """Raises InputError (theirs) or BusyError (the moment's) unless the session can be opened."""
    check_shard(message, serves)
    if message.adapter and message.adapter not in info.adapters:
        raise InputError(
            f"this node has no LoRA adapter named {message.adapter[:64]}",
            code="NO_ADAPTER",
            next_step="use one of the model's manifest, whose files must lie beside the shard",
        )
    check_neighbours(message, info)
    ends = [piece.end for piece in message.prefix]
    if any(end <= before for before, end in itertools.pairwise(ends)):
        raise ProtocolError("the pieces of a prefix are not in order", code="OUT_OF_ORDER")
    if info.is_last != (message.sampling is not None):
        raise _wrong_chain()
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


def check_shard(message: OpenSession | StandBy, serves: StageIdentity) -> None:
    """Raises InputError (theirs) for layers that this stage does not serve."""
    if StageIdentity(message.manifest_digest, message.layer_start, message.layer_end) != serves:
        raise InputError("this node serves another shard now", code="WRONG_SHARD")


def check_share(n_of_node: int, n_max: int) -> None:
    """Raises BusyError (the moment's) for a coordinator that has its share of the sequences."""
    if n_of_node >= n_max:
        raise BusyError(
            f"{n_of_node} sessions of one coordinator are all that this node takes at once",
            next_step="wait until one of yours is over, or raise --sessions-per-node",
        )


def check_neighbours(message: OpenSession | RepairSession, info: EngineInfo) -> None:
    """Raises InputError (theirs) unless the stage's place in the chain is that of its shard."""
    is_first, is_last = message.previous_stage is None, message.next_stage is None
    if (is_first, is_last) != (info.is_first, info.is_last):
        raise _wrong_chain()
    if (message.last_stage and not is_first) or (message.first_stage and not is_last):
        raise _wrong_chain()


def _wrong_chain() -> InputError:
    return InputError("the chain and this stage do not fit together", code="WRONG_CHAIN")


def sampling_settings(message: OpenSession) -> SamplingSettings | None:
    """The engine's settings for the session; None on stages that do not sample."""
    if message.sampling is None:
        return None
    fields = message.sampling.__struct_fields__
    return SamplingSettings(**{name: getattr(message.sampling, name) for name in fields})


def hidden_of(session: StageSession, message: HiddenBatch, body: memoryview) -> Hidden:
    """The hidden states of a frame; raises ProtocolError (theirs) for what was not agreed on."""
    if message.dtype not in (EXACT, session.opened_by.wire):
        raise ProtocolError(f"hidden states came as {message.dtype}, exact ones were asked for")
    return body_to_hidden(body, message.n_tokens, message.n_embd, message.dtype)


def result_message(
    work: Work, output: Output, timings: tuple[StageTiming, ...], *, is_handed: bool
) -> tuple[HiddenBatch | BatchDone, bytes | memoryview]:
    """What goes on: hidden states to the next stage, or word to the coordinator."""
    session, batch = work.session, work.batch
    if output.hidden is not None:
        n_tokens, n_embd = output.hidden.shape
        body, dtype = hidden_to_body(output.hidden, session.opened_by.wire)
        hidden_batch = HiddenBatch(
            session=session.session_id,
            epoch=session.epoch,
            position=batch.position,
            n_tokens=n_tokens,
            n_embd=n_embd,
            dtype=dtype,
            sample=batch.sample,
            timings=timings,
            embed=batch.want_embedding,
            branch=work.branch,
            check=work.check,
            scored=batch.scored,
            hand=work.hand,
        )
        return hidden_batch, body
    chosen = output.sampled
    done = BatchDone(
        session=session.session_id,
        epoch=session.epoch,
        position=batch.position,
        n_tokens=batch.n_tokens,
        sampled=None if chosen is None else _sampled(chosen),
        timings=timings,
        embedding=b"" if output.embedding is None else output.embedding.astype("<f4").tobytes(),
        scores=tuple(_sampled(score) for score in output.scores),
        handed=is_handed,
    )
    return done, b""


def _sampled(token: SampledToken) -> Sampled:
    return Sampled(token=token.token, logprob=token.logprob, top_logprobs=token.top_logprobs)


def failure_message(
    session_id: bytes, epoch: int, serves: StageIdentity, error: ShardmeshError
) -> SessionFailed:
    """Word to the coordinator that the session is over on this stage."""
    return SessionFailed(
        session=session_id,
        epoch=epoch,
        layer_start=serves.layer_start,
        layer_end=serves.layer_end,
        **told(error),
    )


def hop_failure_message(
    session: StageSession, hop: Literal["previous", "next"], error: ShardmeshError
) -> HopFailed:
    """Word to the coordinator that a neighbour failed, and this stage did not."""
    return HopFailed(
        session=session.session_id,
        epoch=session.epoch,
        hop=hop,
        **told(error),
    )
