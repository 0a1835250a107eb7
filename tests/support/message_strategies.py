"""Hypothesis strategies for every message of a link."""

from __future__ import annotations

from hypothesis import strategies as st

from shardmesh.wire.hidden_states import n_body_bytes
from shardmesh.wire.limits import (
    DRAFT_CHECK_BYTES,
    DRAFT_KEY_BYTES,
    SAMPLING_HISTORY_TOKENS_MAX,
)
from shardmesh.wire.messages import (
    BatchDone,
    BatchTaken,
    CloseSession,
    CopyTo,
    Hello,
    HiddenBatch,
    HopFailed,
    KvCopy,
    KvTaken,
    Message,
    NextStage,
    OpenSession,
    Ping,
    Pong,
    PrefixPiece,
    RepairSession,
    ResumeSession,
    Sampled,
    Sampling,
    SessionFailed,
    SessionOpened,
    SessionRepaired,
    StageTiming,
    StandBy,
    StandingBy,
    TokenBatch,
    TrimSession,
)

counts = st.integers(0, 2**31 - 1)
microseconds = st.integers(0, 2**53 - 1)
session_ids = st.binary(min_size=16, max_size=16)
texts = st.text(max_size=40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
parts = st.floats(0, 1)

samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 100),
    top_k=counts,
    top_p=parts,
    min_p=parts,
    typical_p=parts,
    repeat_penalty=st.floats(0, 100, exclude_min=True),
    repeat_last_n=st.integers(0, SAMPLING_HISTORY_TOKENS_MAX),
    frequency_penalty=st.floats(-100, 100),
    presence_penalty=st.floats(-100, 100),
    seed=st.integers(0, 2**32 - 1),
    logit_bias=st.lists(st.tuples(counts, numbers), max_size=4).map(tuple),
    n_top_logprobs=st.integers(0, 64),
)
next_stages = st.builds(NextStage, peer_id=texts, addresses=st.lists(texts, max_size=16).map(tuple))
timings = st.lists(
    st.builds(
        StageTiming,
        layer_start=counts,
        layer_end=counts,
        queue_us=microseconds,
        compute_us=microseconds,
        next_hop_us=microseconds,
    ),
    max_size=3,
).map(tuple)
sampled = st.builds(
    Sampled,
    token=counts,
    logprob=numbers,
    top_logprobs=st.lists(st.tuples(counts, numbers), max_size=3).map(tuple),
)
checks = st.binary(max_size=DRAFT_CHECK_BYTES)
_session = {"session": session_ids, "epoch": counts}

KINDS: dict[type, st.SearchStrategy[Message]] = {
    Hello: st.builds(Hello, version=counts),
    Ping: st.builds(Ping, number=counts),
    Pong: st.builds(Pong, number=counts),
    OpenSession: st.builds(
        OpenSession,
        **_session,
        manifest_digest=texts,
        layer_start=counts,
        layer_end=counts,
        n_ctx=counts,
        previous_stage=st.none() | texts,
        next_stage=st.none() | next_stages,
        first_stage=st.none() | next_stages,
        last_stage=st.none() | texts,
        sampling=st.none() | samplings,
        history=st.lists(counts, max_size=5).map(tuple),
        adapter=texts,
        wire=st.sampled_from(["f32", "f16"]),
        draft_key=st.binary(max_size=DRAFT_KEY_BYTES),
        prefix=st.lists(
            st.builds(PrefixPiece, end=st.integers(1, 2**31 - 1), digest=session_ids), max_size=3
        ).map(tuple),
        take_over=st.booleans(),
    ),
    StandBy: st.builds(
        StandBy,
        session=session_ids,
        manifest_digest=texts,
        layer_start=counts,
        layer_end=counts,
        n_ctx=counts,
        fingerprint=texts,
        source=texts,
    ),
    StandingBy: st.builds(StandingBy, session=session_ids),
    CopyTo: st.builds(CopyTo, session=session_ids, standby=next_stages, fingerprint=texts),
    KvCopy: st.builds(
        KvCopy,
        session=session_ids,
        position=counts,
        n_tokens=st.integers(1, 2**31 - 1),
        n_bytes=st.integers(1, 64),
    ),
    KvTaken: st.builds(KvTaken, session=session_ids, n_taken=counts),
    SessionOpened: st.builds(SessionOpened, **_session, n_held=counts),
    RepairSession: st.builds(
        RepairSession,
        **_session,
        previous_stage=st.none() | texts,
        next_stage=st.none() | next_stages,
        first_stage=st.none() | next_stages,
        last_stage=st.none() | texts,
        branches=st.lists(st.tuples(counts, counts), max_size=3).map(tuple),
    ),
    SessionRepaired: st.builds(
        SessionRepaired,
        **_session,
        n_received=counts,
        n_computed=counts,
        kept_from=counts,
    ),
    ResumeSession: st.builds(ResumeSession, **_session, send_from=counts, n_replay=counts),
    BatchTaken: st.builds(BatchTaken, **_session, n_taken=counts),
    HopFailed: st.builds(
        HopFailed,
        **_session,
        hop=st.sampled_from(["previous", "next"]),
        code=texts,
        blame=st.sampled_from(["ours", "theirs", "moment"]),
        message=texts,
        next_step=texts,
    ),
    TokenBatch: st.builds(
        TokenBatch,
        **_session,
        position=counts,
        tokens=st.lists(counts, min_size=1, max_size=5).map(tuple),
        sample=st.booleans(),
        embed=st.booleans(),
        branch=counts,
        check=checks,
        scored=st.lists(counts, max_size=3).map(tuple),
        hand=st.booleans(),
    ),
    HiddenBatch: st.builds(
        HiddenBatch,
        **_session,
        position=counts,
        n_tokens=st.integers(1, 4),
        n_embd=st.integers(1, 8),
        dtype=st.sampled_from(["f32", "f16"]),
        sample=st.booleans(),
        timings=timings,
        embed=st.booleans(),
        branch=counts,
        check=checks,
        scored=st.lists(counts, max_size=3).map(tuple),
        hand=st.booleans(),
    ),
    BatchDone: st.builds(
        BatchDone,
        **_session,
        position=counts,
        n_tokens=counts,
        sampled=st.none() | sampled,
        timings=timings,
        embedding=st.binary(max_size=16),
        scores=st.lists(sampled, max_size=3).map(tuple),
        handed=st.booleans(),
    ),
    TrimSession: st.builds(TrimSession, **_session, n_keep=counts),
    CloseSession: st.builds(CloseSession, session=session_ids),
    SessionFailed: st.builds(
        SessionFailed,
        **_session,
        layer_start=counts,
        layer_end=counts,
        code=texts,
        blame=st.sampled_from(["ours", "theirs", "moment"]),
        message=texts,
        next_step=texts,
    ),
}

messages: st.SearchStrategy[Message] = st.one_of(*KINDS.values())


def body_of(message: Message) -> bytes:
    """A body of the size that the message asks for."""
    if isinstance(message, KvCopy):
        return bytes(message.n_bytes)
    if not isinstance(message, HiddenBatch):
        return b""
    return bytes(n_body_bytes(message.n_tokens, message.n_embd, message.dtype))
