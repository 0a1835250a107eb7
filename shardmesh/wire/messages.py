"""What is said on a link: one union of messages, each a frame header.

Session control goes between coordinator and stage, hidden states from stage to stage, results
from the last stage to the coordinator.  `docs/protocol.md` has the tables.
"""

from __future__ import annotations

import typing
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from shardmesh.errors import ProtocolError
from shardmesh.wire.codec import decode_tagged, encode_cbor, encode_flat
from shardmesh.wire.error_report import ErrorReport, Text
from shardmesh.wire.framing import decode_frame, encode_frame
from shardmesh.wire.hidden_states import WireType, n_body_bytes
from shardmesh.wire.limits import (
    ANNOUNCEMENT_ADDRESSES_MAX,
    BRANCHES_TOLD_MAX,
    DRAFT_CHECK_BYTES,
    DRAFT_KEY_BYTES,
    EMBEDDING_BYTES_MAX,
    GRAMMAR_BYTES_MAX,
    KV_COPY_BYTES_MAX,
    LOGIT_BIASES_MAX,
    MICRO_BATCH_TOKENS_MAX,
    PREFIX_PIECES_MAX,
    SAMPLING_HISTORY_TOKENS_MAX,
    SCORED_TOKENS_MAX,
    TOP_LOGPROBS_MAX,
)

LINK_VERSION = 1

SessionId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Microseconds = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
Tokens = Annotated[tuple[Token, ...], msgspec.Meta(min_length=1, max_length=MICRO_BATCH_TOKENS_MAX)]
ScoredTokens = Annotated[tuple[Token, ...], msgspec.Meta(max_length=SCORED_TOKENS_MAX)]
"""Known tokens whose log-probabilities are wanted: those behind the first rows, in order."""

DraftKey = Annotated[bytes, msgspec.Meta(max_length=DRAFT_KEY_BYTES)]
BranchStarts = Annotated[
    tuple[tuple[Count, Count], ...], msgspec.Meta(max_length=BRANCHES_TOLD_MAX)
]
"""Pairs of a branch and the position at which it began, both rising."""

Check = Annotated[bytes, msgspec.Meta(max_length=DRAFT_CHECK_BYTES)]
Addresses = Annotated[tuple[Text, ...], msgspec.Meta(max_length=ANNOUNCEMENT_ADDRESSES_MAX)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base: fields are checked when a message is decoded, unknown ones refused."""


class Sampling(_Message, frozen=True):
    """How the last stage samples; the fields of `engine.base.SamplingSettings`."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)]
    top_k: Count
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)]
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)]
    typical_p: Annotated[float, msgspec.Meta(ge=0, le=1)]
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)]
    repeat_last_n: Annotated[int, msgspec.Meta(ge=0, le=SAMPLING_HISTORY_TOKENS_MAX)]
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-100, le=100)]
    presence_penalty: Annotated[float, msgspec.Meta(ge=-100, le=100)]
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)]
    logit_bias: Annotated[
        tuple[tuple[Token, float], ...], msgspec.Meta(max_length=LOGIT_BIASES_MAX)
    ]
    n_top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS_MAX)]
    grammar: Annotated[str, msgspec.Meta(max_length=GRAMMAR_BYTES_MAX)] = ""


class NextStage(_Message, frozen=True):
    """Where a stage sends its hidden states."""

    peer_id: Text
    addresses: Addresses


class PrefixPiece(_Message, frozen=True, array_like=True):
    """A piece of a prompt: where it ends, and a name for all tokens up to there.

    Travels as an array: a long prompt has thousands.
    """

    end: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    digest: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]


class StageTiming(_Message, frozen=True, array_like=True):
    """Where one micro-batch spent its time in one stage.

    Travels as an array: one for each stage passed is in every frame, and keys were most of it.
    """

    layer_start: Count
    layer_end: Count
    queue_us: Microseconds
    compute_us: Microseconds
    next_hop_us: Microseconds  # half a round trip on the link to the next stage


Timings = Annotated[tuple[StageTiming, ...], msgspec.Meta(max_length=1024)]


class Hello(_Message, frozen=True, tag="hello"):
    """First frame in each direction: proves the key and names the version."""

    version: Count


class Ping(_Message, frozen=True, tag="ping"):
    """Heartbeat, answered by a Pong with the same number."""

    number: Count


class Pong(_Message, frozen=True, tag="pong"):
    number: Count


class OpenSession(_Message, frozen=True, tag="open"):
    """Coordinator to stage: reserve a sequence; answered by SessionOpened or SessionFailed."""

    session: SessionId
    epoch: Count
    manifest_digest: Text
    layer_start: Count
    layer_end: Count
    n_ctx: Count  # tokens that the session may come to hold
    previous_stage: Text | None  # peer id that hidden states must come from; None on the first
    next_stage: NextStage | None
    first_stage: NextStage | None  # on the last stage: where it may hand tokens on
    last_stage: Text | None  # on the first stage: peer id of who may hand tokens on to it
    sampling: Sampling | None  # on the last stage
    history: Annotated[tuple[Token, ...], msgspec.Meta(max_length=SAMPLING_HISTORY_TOKENS_MAX)]
    adapter: Text  # name of the LoRA adapter in the manifest; empty: none
    wire: WireType  # how hidden states go on to the next stage, and may come in
    draft_key: DraftKey  # of the checks of drafts, for the last stage; empty: no drafts
    # Whole pieces of the prompt in order, which the stage may begin behind and keep for others.
    prefix: Annotated[tuple[PrefixPiece, ...], msgspec.Meta(max_length=PREFIX_PIECES_MAX)]
    take_over: bool  # begin behind the KV that the stage keeps as the session's standby, if any


class SessionOpened(_Message, frozen=True, tag="opened"):
    """Stage to coordinator: it has a sequence, and a link to the next stage."""

    session: SessionId
    epoch: Count
    n_held: Count  # positions that are there already: of the prefix, or of what it stood by with


class RepairSession(_Message, frozen=True, tag="repair"):
    """Coordinator to a stage that holds the session: a neighbour changes, stop sending.

    Answered by SessionRepaired, HopFailed or SessionFailed.
    """

    session: SessionId
    epoch: Count  # the new one; frames of older ones are refused from now on
    previous_stage: Text | None
    next_stage: NextStage | None
    first_stage: NextStage | None
    last_stage: Text | None
    branches: BranchStarts  # the newest ones; what older ones put at these positions is void


class SessionRepaired(_Message, frozen=True, tag="repaired"):
    """Stage to coordinator: what the stage has, so that the coordinator can say who sends what."""

    session: SessionId
    epoch: Count
    n_received: Count  # the position that must come next
    n_computed: Count  # what waits for the engine lies between this and n_received
    kept_from: Count  # from this position on the stage can send what it computed again


class ResumeSession(_Message, frozen=True, tag="resume"):
    """Coordinator to every stage, once all have answered in the new epoch: send again."""

    session: SessionId
    epoch: Count
    send_from: Count  # the next hop lacks what was computed from this position on
    n_replay: Count  # positions below are acknowledged by BatchTaken


class BatchTaken(_Message, frozen=True, tag="taken"):
    """Stage to the previous hop, in a replay: computed, and sent on or not needed behind it."""

    session: SessionId
    epoch: Count
    n_taken: Count  # all positions below


class HopFailed(ErrorReport, frozen=True, tag="hop_failed"):
    """Stage to coordinator: a neighbour is gone or sends what cannot be right.

    The stage itself is well and holds the session until it is repaired or closed.
    """

    session: SessionId
    epoch: Count
    hop: Literal["previous", "next"]


class TokenBatch(_Message, frozen=True, tag="tokens"):
    """To the first stage: a micro-batch of token ids, from the coordinator or the last stage."""

    session: SessionId
    epoch: Count
    position: Count
    tokens: Tokens
    sample: bool
    embed: bool  # the last stage gives an embedding of these tokens
    branch: Count  # a higher one takes the place of all that came from `position` on
    check: Check  # of a draft: it counts only if the last stage sampled just this token
    scored: ScoredTokens
    hand: bool  # the last stage may hand what it samples behind these on to the first stage


class HiddenBatch(_Message, frozen=True, tag="hidden"):
    """Stage to stage: a micro-batch of hidden states, the body (n_tokens, n_embd) row by row."""

    session: SessionId
    epoch: Count
    position: Count
    n_tokens: Annotated[int, msgspec.Meta(ge=1, le=MICRO_BATCH_TOKENS_MAX)]
    n_embd: Annotated[int, msgspec.Meta(ge=1, le=2**20)]
    dtype: WireType
    sample: bool
    timings: Timings
    embed: bool
    branch: Count
    check: Check
    scored: ScoredTokens
    hand: bool


class Sampled(_Message, frozen=True):
    """A token with its natural log-probability and the best alternatives."""

    token: Token
    logprob: float
    top_logprobs: Annotated[
        tuple[tuple[Token, float], ...], msgspec.Meta(max_length=TOP_LOGPROBS_MAX)
    ]


class BatchDone(_Message, frozen=True, tag="done"):
    """Last stage to coordinator: a micro-batch has gone through the whole chain."""

    session: SessionId
    epoch: Count
    position: Count  # of the micro-batch
    n_tokens: Count
    sampled: Sampled | None
    timings: Timings
    embedding: Annotated[bytes, msgspec.Meta(max_length=EMBEDDING_BYTES_MAX)]  # f32; empty
    scores: Annotated[tuple[Sampled, ...], msgspec.Meta(max_length=SCORED_TOKENS_MAX)]
    handed: bool  # the token that was sampled went to the first stage as well

    def embedding_values(self) -> npt.NDArray[np.float32]:
        """The embedding (n_embd,); raises ProtocolError (theirs) unless it is finite numbers."""
        if len(self.embedding) % 4:
            raise ProtocolError(f"an embedding of {len(self.embedding)} bytes", code="BAD_FRAME")
        values = np.frombuffer(self.embedding, dtype="<f4")
        if not np.isfinite(values).all():
            raise ProtocolError("an embedding holds a value that is not finite", code="NOT_FINITE")
        return values


class TrimSession(_Message, frozen=True, tag="trim"):
    """Coordinator to stage: forget all positions >= n_keep; answered by SessionRepaired."""

    session: SessionId
    epoch: Count
    n_keep: Count


class CloseSession(_Message, frozen=True, tag="close"):
    """Coordinator to stage: the session is over; not answered."""

    session: SessionId


class StandBy(_Message, frozen=True, tag="stand_by"):
    """Coordinator to a replica of a stage: keep a copy of that stage's KV.

    Answered by StandingBy or SessionFailed; over with CloseSession, or with the link.
    """

    session: SessionId
    manifest_digest: Text
    layer_start: Count
    layer_end: Count
    n_ctx: Count  # positions that may come
    fingerprint: Text  # of the engine that computes them, which must be the replica's own
    source: Text  # peer id of the stage


class StandingBy(_Message, frozen=True, tag="standing_by"):
    """Replica to coordinator: it takes the copy."""

    session: SessionId


class CopyTo(_Message, frozen=True, tag="copy_to"):
    """Coordinator to a stage that holds the session: copy the KV to a replica; not answered."""

    session: SessionId
    standby: NextStage
    fingerprint: Text  # of the replica's engine, which must be the stage's own


class KvCopy(_Message, frozen=True, tag="kv"):
    """Stage to its standby: the KV of positions, the body (n_tokens, bytes of one) row by row."""

    session: SessionId
    position: Count  # 0 begins anew; else that which follows on what was sent before
    n_tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
    n_bytes: Annotated[int, msgspec.Meta(ge=1, le=KV_COPY_BYTES_MAX)]  # of the body


class KvTaken(_Message, frozen=True, tag="kv_taken"):
    """Standby to stage: it keeps all positions below, and more may be sent; 0: send no more."""

    session: SessionId
    n_taken: Count


class SessionFailed(ErrorReport, frozen=True, tag="failed"):
    """Stage to coordinator: the session is over on this stage, and why."""

    session: SessionId
    epoch: Count
    layer_start: Count
    layer_end: Count


Message = (
    Hello
    | Ping
    | Pong
    | OpenSession
    | SessionOpened
    | RepairSession
    | SessionRepaired
    | ResumeSession
    | TokenBatch
    | HiddenBatch
    | BatchDone
    | BatchTaken
    | HopFailed
    | TrimSession
    | CloseSession
    | SessionFailed
    | StandBy
    | StandingBy
    | CopyTo
    | KvCopy
    | KvTaken
)

_KINDS: dict[str, type[Message]] = {
    kind.__struct_config__.tag: kind for kind in typing.get_args(Message)
}

_FLAT: frozenset[type[Message]] = frozenset((TokenBatch, HiddenBatch, BatchTaken, Ping, Pong))
"""See `codec.encode_flat`: what is sent for each token, and heartbeats."""


def encode_message(message: Message, body: bytes | memoryview = b"") -> bytes:
    """A message as one frame, not yet sealed."""
    encode = encode_flat if type(message) in _FLAT else encode_cbor
    return encode_frame(encode(message), body)


def decode_message(frame: bytes) -> tuple[Message, memoryview]:
    """A message and its body; raises ProtocolError (theirs).

    Only a HiddenBatch and a KvCopy have a body, of exactly the size that they name.
    """
    header, body = decode_frame(frame)
    message = decode_tagged(header, _KINDS, _FLAT)
    n_body = 0
    if isinstance(message, HiddenBatch):
        n_body = n_body_bytes(message.n_tokens, message.n_embd, message.dtype)
    elif isinstance(message, KvCopy):
        n_body = message.n_bytes
    if len(body) != n_body:
        raise ProtocolError(f"a body of {n_body} bytes was due, {len(body)} came", code="BAD_FRAME")
    return message, body
