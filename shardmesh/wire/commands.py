"""The commands that a node takes over /json-message/1.0: JSON in, JSON out.

{"command": "LOAD_SHARD", "request_id": "7", "params": {"shard_id": 2}}
{"status": "ok", "data": {...}, "error": null}
{"status": "error", "data": null, "error": {"code": "BUSY", "blame": "moment", ...}}
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, get_args

import msgspec

from shardmesh.errors import ProtocolError, ShardmeshError
from shardmesh.wire.codec import convert, decode_json, encode_json
from shardmesh.wire.error_report import ErrorReport, Text, told
from shardmesh.wire.limits import (
    CHAT_MESSAGES_MAX,
    COMMAND_BYTES_MAX,
    COMMAND_RESPONSE_BYTES_MAX,
    GRAMMAR_BYTES_MAX,
    LOGIT_BIASES_MAX,
    PROMPT_BYTES_MAX,
    SAMPLING_HISTORY_TOKENS_MAX,
    STOP_STRINGS_MAX,
    TOP_LOGPROBS_MAX,
)

JSON_PROTOCOL: Final = "/json-message/1.0"
METRICS_PROTOCOL: Final = "/metrics/1.0"

CommandName = Literal[
    "GET_CAPABILITIES",
    "LOAD_SHARD",
    "UNLOAD_SHARD",
    "DRAIN",
    "INFERENCE",
    "LIST_FILES",
    "GET_METRICS",
]
Prompt = Annotated[str, msgspec.Meta(max_length=PROMPT_BYTES_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base: unknown fields are refused."""


class NoParams(_Message, frozen=True):
    """A command that takes none."""


class LoadShardParams(_Message, frozen=True):
    """A shard is asked for by model and number, never by a path."""

    shard_id: Count
    model: Text | None = None  # the node's own model if None


class ChatMessage(_Message, frozen=True):
    role: Literal["system", "user", "assistant"]
    content: Prompt


class InferenceParams(_Message, frozen=True):
    """A prompt, or messages for the model's chat template; what is None is up to the node."""

    prompt: Prompt | None = None
    messages: Annotated[tuple[ChatMessage, ...], msgspec.Meta(max_length=CHAT_MESSAGES_MAX)] = ()
    model: Text | None = None  # the only one that the mesh serves if None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, lt=2**31)] = 128
    stop: Annotated[tuple[Text, ...], msgspec.Meta(max_length=STOP_STRINGS_MAX)] = ()
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_k: Count | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    repeat_last_n: Annotated[int, msgspec.Meta(ge=0, le=SAMPLING_HISTORY_TOKENS_MAX)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-100, le=100)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-100, le=100)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None = None
    logit_bias: (
        Annotated[tuple[tuple[Count, float], ...], msgspec.Meta(max_length=LOGIT_BIASES_MAX)] | None
    ) = None
    n_top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    grammar: Annotated[str, msgspec.Meta(max_length=GRAMMAR_BYTES_MAX)] | None = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("give either a prompt or messages")


Params = NoParams | LoadShardParams | InferenceParams

PARAMS: Final[dict[str, type[Params]]] = {
    "GET_CAPABILITIES": NoParams,
    "LOAD_SHARD": LoadShardParams,
    "UNLOAD_SHARD": NoParams,
    "DRAIN": NoParams,
    "INFERENCE": InferenceParams,
    "LIST_FILES": NoParams,
    "GET_METRICS": NoParams,
}


CHANGING_COMMANDS: Final = frozenset({"LOAD_SHARD", "UNLOAD_SHARD", "DRAIN"})
"""Commands that change what a node does for others; they take a right of their own."""


class Command(_Message, frozen=True):
    """A request; `params` are typed by `decode_command`."""

    command: Text
    request_id: Annotated[str, msgspec.Meta(max_length=128)] = ""
    params: dict[str, Any] = {}


class WireError(ErrorReport, frozen=True, kw_only=True):
    """An error as it travels; the fields of a ShardmeshError."""

    next_step: Text = ""


class CommandResponse(_Message, frozen=True):
    """An answer: data, or an error."""

    status: Literal["ok", "error"]
    data: Any = None
    error: WireError | None = None

    def __post_init__(self) -> None:
        if (self.status == "error") != (self.error is not None):
            raise ValueError("an error comes with status error, and only then")


def encode_command(command: str, params: object = None, *, request_id: str = "") -> bytes:
    """The bytes of a request; `params` is a struct of this module or a dictionary.

    Raises ProtocolError (theirs) for an unknown command or params that the other side would
    refuse.
    """
    fields = {} if params is None else msgspec.to_builtins(params)
    data = encode_json(Command(command=command, request_id=request_id, params=fields))
    decode_command(data)
    return data


def decode_command(data: bytes) -> tuple[Command, Params]:
    """A request and its typed params; raises ProtocolError (theirs), UNKNOWN_COMMAND among them."""
    if len(data) > COMMAND_BYTES_MAX:
        raise ProtocolError(f"a command of {len(data)} bytes", code="TOO_LARGE")
    command = decode_json(data, Command)
    kind = PARAMS.get(command.command)
    if kind is None:
        raise ProtocolError(
            f"unknown command {command.command[:64]!r}",
            code="UNKNOWN_COMMAND",
            next_step=f"Known are: {', '.join(get_args(CommandName))}.",
        )
    return command, convert(command.params, kind)


def encode_data(data: object) -> bytes:
    """The bytes of a good answer; ProtocolError if it is too long to be sent."""
    encoded = encode_json(CommandResponse(status="ok", data=msgspec.to_builtins(data)))
    if len(encoded) > COMMAND_RESPONSE_BYTES_MAX:
        raise ProtocolError(f"an answer of {len(encoded)} bytes", code="TOO_LARGE")
    return encoded


def encode_error(error: ShardmeshError) -> bytes:
    """The bytes of an answer that reports an error."""
    return encode_json(CommandResponse(status="error", error=WireError(**told(error))))


def decode_response(data: bytes) -> Any:
    """The data of an answer; raises the error that it reports, or ProtocolError (theirs)."""
    response = decode_json(data, CommandResponse)
    if response.error is not None:
        raise response.error.error()
    return response.data
