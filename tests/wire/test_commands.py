from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import BusyError, ProtocolError, ShardmeshError
from shardmesh.wire.commands import (
    ChatMessage,
    InferenceParams,
    LoadShardParams,
    NoParams,
    decode_command,
    decode_response,
    encode_command,
    encode_data,
    encode_error,
)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("GET_CAPABILITIES", NoParams()),
        ("LIST_FILES", NoParams()),
        ("GET_METRICS", NoParams()),
        ("UNLOAD_SHARD", NoParams()),
        ("LOAD_SHARD", LoadShardParams(shard_id=2, model="fairy")),
        ("INFERENCE", InferenceParams(prompt="Once", max_tokens=5, logit_bias=((3, -1.5),))),
        ("INFERENCE", InferenceParams(messages=(ChatMessage(role="user", content="Hi"),))),
    ],
)
def test_what_was_asked_arrives(name: str, params: object) -> None:
    command, arrived = decode_command(encode_command(name, params, request_id="7"))
    assert (command.command, command.request_id, arrived) == (name, "7", params)


def test_by_hand() -> None:
    _, params = decode_command(b'{"command": "LOAD_SHARD", "params": {"shard_id": 2}}')
    assert params == LoadShardParams(shard_id=2)
    assert decode_command(b'{"command":"LIST_FILES"}')[1] == NoParams()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'"LIST_FILES"',
        b'{"command":"LIST_FILES","command":"LIST_FILES"}',
        b'{"command":"LIST_FILES","extra":1}',
        b'{"command":"LIST_FILES","params":{"path":"/etc"}}',
        b'{"command":"LOAD_SHARD","params":{}}',
        b'{"command":"LOAD_SHARD","params":{"shard_id":"2"}}',
        b'{"command":"LOAD_SHARD","params":{"shard_id":-1}}',
        b'{"command":"INFERENCE","params":{}}',
        b'{"command":"INFERENCE","params":{"prompt":"a","messages":[{"role":"user","content":"b"}]}}',
        b'{"command":"INFERENCE","params":{"prompt":"a","temperature":NaN}}',
        b'{"command":"INFERENCE","params":{"prompt":"a","top_p":1.5}}',
        b'{"command":"INFERENCE","params":{"prompt":"a","max_tokens":0}}',
        b'{"command":"INFERENCE","params":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_command_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_command(data)


def test_unknown_command_names_the_known_ones() -> None:
    with pytest.raises(ProtocolError, match="unknown command 'FORMAT_DISK'") as caught:
        encode_command("FORMAT_DISK")
    assert caught.value.code == "UNKNOWN_COMMAND"
    assert "LIST_FILES" in caught.value.next_step


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_command(data)
    with pytest.raises(ProtocolError):
        decode_response(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(json_values)
def test_data_comes_back(data: object) -> None:
    assert decode_response(encode_data(data)) == data


def test_response_has_exactly_status_data_and_error() -> None:
    assert json.loads(encode_data({"a": 1})) == {"status": "ok", "data": {"a": 1}, "error": None}
    answer = json.loads(encode_error(BusyError("full", next_step="wait")))
    assert answer == {
        "status": "error",
        "data": None,
        "error": {"code": "BUSY", "blame": "moment", "message": "full", "next_step": "wait"},
    }


def test_error_comes_back_as_itself() -> None:
    with pytest.raises(BusyError, match="full") as caught:
        decode_response(encode_error(BusyError("full", next_step="wait")))
    assert caught.value.next_step == "wait"


def test_long_error_still_fits() -> None:
    with pytest.raises(ShardmeshError):
        decode_response(encode_error(ShardmeshError("\N{GRINNING FACE}" * 100_000)))


def test_error_without_status_error_is_refused() -> None:
    with pytest.raises(ProtocolError):
        decode_response(b'{"status":"error","data":null,"error":null}')
