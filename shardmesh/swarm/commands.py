"""Serving and sending the JSON commands over libp2p streams."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final

import msgspec
import trio

from shardmesh.errors import BusyError, OurError, RefusedError, ShardmeshError
from shardmesh.swarm.host import Host
from shardmesh.swarm.rights import EVERYBODY, Rights
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.wire.codec import convert
from shardmesh.wire.commands import (
    JSON_PROTOCOL,
    METRICS_PROTOCOL,
    decode_command,
    decode_response,
    encode_command,
    encode_data,
    encode_error,
)
from shardmesh.wire.limits import (
    COMMAND_BYTES_MAX,
    COMMAND_RESPONSE_BYTES_MAX,
    COMMAND_TIMEOUT_S,
    REQUEST_READ_TIMEOUT_S,
)

CommandHandler = Callable[[Any], Awaitable[object]]
"""Takes the command's params (a struct of wire/commands.py), gives data that JSON can hold."""

ADDRESSES_SAID_MAX: Final = 256
"""Of one node, when it is asked; a machine with many networks has dozens."""

_log = logging.getLogger(__name__)


def serve_commands(
    host: Host, handlers: Mapping[str, CommandHandler], rights: Rights = EVERYBODY
) -> None:
    """Answers /json-message/1.0 and, if there is a GET_METRICS handler, /metrics/1.0.

    `rights` says who may send what; the others are told NOT_ALLOWED.
    A ShardmeshError of a handler is reported as it is, anything else as INTERNAL without details.
    A handler is cancelled when the asking side resets its stream.
    """

    async def serve_json(stream: ByteStream, peer_id: str) -> None:
        await send_message(stream, await _answer(stream, peer_id, handlers, rights))

    async def serve_metrics(stream: ByteStream, peer_id: str) -> None:
        await send_message(stream, await _run(handlers["GET_METRICS"], None))

    busy = encode_error(
        BusyError("this node serves too many requests already", next_step="Try again in a moment.")
    )
    host.serve(JSON_PROTOCOL, serve_json, busy=busy)
    if "GET_METRICS" in handlers:
        host.serve(METRICS_PROTOCOL, serve_metrics, busy=busy)


async def send_command(
    host: Host,
    peer_id: str,
    command: str,
    params: object = None,
    timeout_s: float = COMMAND_TIMEOUT_S,
) -> Any:
    """Sends one command to a node and gives the data of its answer.

    `params` is a struct of wire/commands.py or a dictionary.  Raises the error that the node
    reports, UnreachableError (the moment's) if it does not answer in time, ProtocolError (theirs)
    for params or an answer that break the protocol.  A cancellation resets the stream, which
    cancels the work on the other side.
    """
    answer = await host.request(
        peer_id,
        JSON_PROTOCOL,
        encode_command(command, params),
        timeout_s=timeout_s,
        response_bytes_max=COMMAND_RESPONSE_BYTES_MAX,
    )
    return decode_response(answer)


_Word = Annotated[str, msgspec.Meta(max_length=256, pattern="^[ -~]*$")]  # shown on terminals


class SaidOfItself(msgspec.Struct, frozen=True):
    """What is used of a node's answer to GET_CAPABILITIES; empty what it does not say."""

    role: _Word = ""  # of a node that serves no shard
    version: _Word = ""
    addresses: Annotated[tuple[_Word, ...], msgspec.Meta(max_length=ADDRESSES_SAID_MAX)] = ()
    shard_id: int | None = None
    shard_state: _Word = ""


async def get_capabilities(
    host: Host, peer_id: str, timeout_s: float = COMMAND_TIMEOUT_S
) -> SaidOfItself:
    """What a node says of itself; raises as `send_command` does."""
    return convert(
        await send_command(host, peer_id, "GET_CAPABILITIES", None, timeout_s), SaidOfItself
    )


async def get_metrics(host: Host, peer_id: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Any:
    """What a node tells over /metrics/1.0; raises as `send_command` does."""
    answer = await host.request(
        peer_id,
        METRICS_PROTOCOL,
        b"",
        timeout_s=timeout_s,
        response_bytes_max=COMMAND_RESPONSE_BYTES_MAX,
    )
    return decode_response(answer)


async def _answer(
    stream: ByteStream, peer_id: str, handlers: Mapping[str, CommandHandler], rights: Rights
) -> bytes:
    try:
        with trio.fail_after(REQUEST_READ_TIMEOUT_S):
            data = await receive_message(stream, COMMAND_BYTES_MAX)
        command, params = decode_command(data)
        rights.check(command.command, peer_id)
    except ShardmeshError as error:
        return encode_error(error)
    except trio.TooSlowError:
        return encode_error(RefusedError("the request did not come in time", code="TOO_SLOW"))
    handler = handlers.get(command.command)
    if handler is None:
        return encode_error(
            RefusedError(
                f"this node does not take {command.command}",
                code="UNSUPPORTED_COMMAND",
                next_step="Ask a listener.",
            )
        )
    return await _run(handler, params)


async def _run(handler: CommandHandler, params: object) -> bytes:
    try:
        return encode_data(await handler(params))
    except ShardmeshError as error:
        return encode_error(error)
    except Exception:  # noqa: BLE001 - a defect of ours, which the other side learns nothing about
        _log.exception("a command failed")
        return encode_error(
            OurError("the node failed at this command", next_step="Look into its log.")
        )
