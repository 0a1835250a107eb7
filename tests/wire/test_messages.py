"""Messages of a link: every kind goes round, everything else is a ProtocolError."""

from __future__ import annotations

import typing
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.message_strategies import KINDS, body_of, messages

from shardmesh.errors import BusyError, ProtocolError
from shardmesh.wire.codec import encode_cbor
from shardmesh.wire.framing import LENGTH, RecordReader, decode_frame, encode_frame
from shardmesh.wire.limits import (
    ANNOUNCEMENT_ADDRESSES_MAX,
    DRAFT_CHECK_BYTES,
    DRAFT_KEY_BYTES,
    EMBEDDING_BYTES_MAX,
    KV_COPY_BYTES_MAX,
    LOGIT_BIASES_MAX,
    MICRO_BATCH_TOKENS_MAX,
    PREFIX_PIECES_MAX,
    SAMPLING_HISTORY_TOKENS_MAX,
    SCORED_TOKENS_MAX,
    TEXT_BYTES_MAX,
    TOP_LOGPROBS_MAX,
)
from shardmesh.wire.messages import (
    HiddenBatch,
    KvCopy,
    Message,
    SessionFailed,
    decode_message,
    encode_message,
)

ID = bytes(16)
TOKENS: dict[str, Any] = {
    "type": "tokens",
    "session": ID,
    "epoch": 0,
    "position": 0,
    "tokens": [1],
    "sample": True,
    "embed": False,
    "branch": 0,
    "check": b"",
    "scored": [],
    "hand": True,
}
HIDDEN: dict[str, Any] = {
    "type": "hidden",
    "session": ID,
    "epoch": 0,
    "position": 0,
    "n_tokens": 1,
    "n_embd": 2,
    "dtype": "f32",
    "sample": False,
    "embed": False,
    "branch": 0,
    "check": b"",
    "scored": [],
    "hand": True,
    "timings": [],
}
SAMPLING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "seed": 1,
    "logit_bias": [],
    "n_top_logprobs": 0,
}
OPEN: dict[str, Any] = {
    "type": "open",
    "session": ID,
    "epoch": 0,
    "manifest_digest": "d",
    "layer_start": 0,
    "layer_end": 4,
    "n_ctx": 16,
    "previous_stage": None,
    "next_stage": {"peer_id": "p", "addresses": []},
    "first_stage": None,
    "last_stage": "p",
    "sampling": SAMPLING,
    "history": [],
    "adapter": "",
    "wire": "f32",
    "draft_key": b"",
    "prefix": [],
    "take_over": False,
}
KV: dict[str, Any] = {
    "type": "kv",
    "session": ID,
    "position": 0,
    "n_tokens": 2,
    "n_bytes": KV_COPY_BYTES_MAX,
}
DONE: dict[str, Any] = {
    "type": "done",
    "session": ID,
    "epoch": 0,
    "position": 0,
    "n_tokens": 1,
    "sampled": {"token": 1, "logprob": -0.5, "top_logprobs": []},
    "timings": [],
    "embedding": b"",
    "scores": [],
    "handed": True,
}
SCORE = {"token": 1, "logprob": -0.5, "top_logprobs": []}


def decode(fields: object, body: bytes = b"") -> Message:
    return decode_message(encode_frame(cbor2.dumps(fields, canonical=True), body))[0]


def test_there_is_a_strategy_for_every_kind() -> None:
    assert set(KINDS) == set(typing.get_args(Message))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_kind_goes_round(kind: type, data: st.DataObject) -> None:
    message = data.draw(KINDS[kind])
    frame = encode_message(message, body_of(message))
    found, body = decode_message(frame)
    assert found == message
    assert bytes(body) == body_of(message)
    assert encode_message(found, body) == frame
    assert bytes(decode_frame(frame)[0]) == encode_cbor(message)


@given(st.lists(messages, max_size=4), st.data())
def test_messages_come_through_a_stream_cut_anywhere(
    sent: list[Message], data: st.DataObject
) -> None:
    frames = [encode_message(message, body_of(message)) for message in sent]
    stream = b"".join(LENGTH.pack(len(frame)) + frame for frame in frames)
    cut = data.draw(st.integers(0, len(stream)))
    for pieces in ([stream[:cut], stream[cut:]], [bytes([byte]) for byte in stream]):
        reader = RecordReader()
        records = [record for piece in pieces for record in reader.feed(piece)]
        assert [decode_message(record)[0] for record in records] == sent


@given(messages, st.data())
def test_a_message_that_is_cut_or_altered_never_raises_anything_else(
    message: Message, data: st.DataObject
) -> None:
    frame = encode_message(message, body_of(message))
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(ProtocolError):
        decode_message(frame[:cut])
    altered = bytearray(frame)
    altered[cut] ^= data.draw(st.integers(1, 255))
    try:
        decode_message(bytes(altered))
    except ProtocolError:
        return


@given(st.binary(max_size=80))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    for frame in (data, encode_frame(data), encode_frame(encode_cbor({"type": "ping"}), data)):
        with pytest.raises(ProtocolError):
            decode_message(frame)


@given(messages.filter(lambda m: not isinstance(m, HiddenBatch | KvCopy)))
def test_only_hidden_states_and_kv_have_a_body(message: Message) -> None:
    with pytest.raises(ProtocolError):
        decode_message(encode_message(message, b"\x00"))


@pytest.mark.parametrize("n_body", [0, 7, 9])
def test_hidden_states_have_exactly_the_body_that_they_name(n_body: int) -> None:
    decode(HIDDEN, bytes(8))
    with pytest.raises(ProtocolError) as caught:
        decode(HIDDEN, bytes(n_body))
    assert caught.value.code == "BAD_FRAME"


@pytest.mark.parametrize("n_body", [0, 1, KV_COPY_BYTES_MAX - 1])
def test_kv_has_exactly_the_body_that_it_names(n_body: int) -> None:
    decode(KV, bytes(KV_COPY_BYTES_MAX))
    with pytest.raises(ProtocolError) as caught:
        decode(KV, bytes(n_body))
    assert caught.value.code == "BAD_FRAME"


def test_kv_beyond_its_limit() -> None:
    n_bytes = KV_COPY_BYTES_MAX + 1
    with pytest.raises(ProtocolError):
        decode({**KV, "n_bytes": n_bytes}, bytes(n_bytes))


def repeated(item: Any, n: int) -> list[Any]:
    return [item] * n


@pytest.mark.parametrize(
    ("fields", "field", "at_limit", "past_limit"),
    [
        (TOKENS, "tokens", repeated(1, MICRO_BATCH_TOKENS_MAX), [1] * (MICRO_BATCH_TOKENS_MAX + 1)),
        (TOKENS, "tokens", [1], []),
        (TOKENS, "tokens", [2**31 - 1], [2**31]),
        (TOKENS, "tokens", [0], [-1]),
        (TOKENS, "position", 2**31 - 1, 2**31),
        (DONE, "embedding", bytes(EMBEDDING_BYTES_MAX), bytes(EMBEDDING_BYTES_MAX + 1)),
        (TOKENS, "scored", [1] * SCORED_TOKENS_MAX, [1] * (SCORED_TOKENS_MAX + 1)),
        (DONE, "scores", [SCORE] * SCORED_TOKENS_MAX, [SCORE] * (SCORED_TOKENS_MAX + 1)),
        (TOKENS, "check", bytes(DRAFT_CHECK_BYTES), bytes(DRAFT_CHECK_BYTES + 1)),
        (OPEN, "draft_key", bytes(DRAFT_KEY_BYTES), bytes(DRAFT_KEY_BYTES + 1)),
        (TOKENS, "epoch", 0, -1),
        (TOKENS, "session", ID, bytes(15)),
        (TOKENS, "session", ID, bytes(17)),
        (OPEN, "manifest_digest", "d" * TEXT_BYTES_MAX, "d" * (TEXT_BYTES_MAX + 1)),
        (
            OPEN,
            "history",
            repeated(1, SAMPLING_HISTORY_TOKENS_MAX),
            repeated(1, SAMPLING_HISTORY_TOKENS_MAX + 1),
        ),
        (
            OPEN,
            "prefix",
            repeated([1, ID], PREFIX_PIECES_MAX),
            repeated([1, ID], PREFIX_PIECES_MAX + 1),
        ),
        (OPEN, "prefix", [[1, ID]], [[0, ID]]),
        (OPEN, "prefix", [[1, ID]], [[1, ID[:15]]]),
        (
            OPEN,
            "next_stage",
            {"peer_id": "p", "addresses": ["a"] * ANNOUNCEMENT_ADDRESSES_MAX},
            {"peer_id": "p", "addresses": ["a"] * (ANNOUNCEMENT_ADDRESSES_MAX + 1)},
        ),
        (
            OPEN,
            "sampling",
            {**SAMPLING, "logit_bias": [[1, 0.5]] * LOGIT_BIASES_MAX},
            {**SAMPLING, "logit_bias": [[1, 0.5]] * (LOGIT_BIASES_MAX + 1)},
        ),
        (
            OPEN,
            "sampling",
            {**SAMPLING, "n_top_logprobs": TOP_LOGPROBS_MAX},
            {**SAMPLING, "n_top_logprobs": TOP_LOGPROBS_MAX + 1},
        ),
        (OPEN, "sampling", {**SAMPLING, "top_p": 1.0}, {**SAMPLING, "top_p": 1.5}),
        (
            OPEN,
            "sampling",
            {**SAMPLING, "repeat_penalty": 0.5},
            {**SAMPLING, "repeat_penalty": 0.0},
        ),
        (OPEN, "sampling", {**SAMPLING, "seed": 2**32 - 1}, {**SAMPLING, "seed": 2**32}),
        (
            DONE,
            "sampled",
            {"token": 1, "logprob": 0.5, "top_logprobs": [[1, 0.5]] * TOP_LOGPROBS_MAX},
            {"token": 1, "logprob": 0.5, "top_logprobs": [[1, 0.5]] * (TOP_LOGPROBS_MAX + 1)},
        ),
        (DONE, "sampled", None, {"token": 1, "logprob": float("nan"), "top_logprobs": []}),
    ],
)
def test_each_field_at_its_limit_and_one_past_it(
    fields: dict[str, Any], field: str, at_limit: Any, past_limit: Any
) -> None:
    decode({**fields, field: at_limit})
    with pytest.raises(ProtocolError):
        decode({**fields, field: past_limit})


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": 0},
        {"n_tokens": MICRO_BATCH_TOKENS_MAX + 1},
        {"n_embd": 0},
        {"n_embd": 2**20 + 1},
        {"dtype": "f16"},
        {"dtype": "os.system"},
        {"extra": 1},
        {"type": "hello"},
        {"type": "unknown"},
        {"type": 1},
    ],
)
def test_hidden_states_with_wrong_fields_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        decode({**HIDDEN, **change}, bytes(8))


def test_the_type_of_hidden_states_decides_how_long_their_body_is() -> None:
    assert isinstance(decode({**HIDDEN, "dtype": "f16"}, bytes(4)), HiddenBatch)
    for fields, n_bytes in (({"dtype": "f16"}, 8), ({"dtype": "f32"}, 4), ({"dtype": "f64"}, 16)):
        with pytest.raises(ProtocolError):
            decode({**HIDDEN, **fields}, bytes(n_bytes))


@pytest.mark.parametrize("fields", [{}, [], None, 1, "hello", {"type": "tokens"}])
def test_headers_that_are_no_message_are_refused(fields: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(fields)


def test_a_failure_travels_with_code_blame_and_next_step() -> None:
    failed = SessionFailed(
        session=ID,
        epoch=0,
        layer_start=0,
        layer_end=1,
        code="BUSY",
        blame="moment",
        message="no room",
        next_step="wait",
    )
    found, _ = decode_message(encode_message(failed))
    assert isinstance(found, SessionFailed)
    error = found.error()
    assert isinstance(error, BusyError)
    assert (str(error), error.code, error.next_step) == ("no room", "BUSY", "wait")
