"""What the answers look like, for the document at `/openapi.json`."""

from __future__ import annotations

from typing import Any

import pydantic

from shardmesh.web.errors import ErrorBody


class PromptTokens(pydantic.BaseModel):
    """Of the prompt's tokens those that the stages held already."""

    cached_tokens: int


class Usage(pydantic.BaseModel):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class StageTime(pydantic.BaseModel):
    """Where one stage's time went, over all tokens behind the first."""

    layer_start: int
    layer_end: int
    compute_ms: float
    queue_ms: float
    wire_ms: float


class ChoiceTimes(pydantic.BaseModel):
    """What Shardmesh adds for each choice: which nodes served it and where the time went."""

    peer_ids: list[str]
    first_token_ms: float
    total_ms: float
    tokens_per_s: float | None
    first_hop_ms: float
    n_drafts: int  # tokens guessed ahead
    n_drafts_right: int
    n_handed: int  # tokens that the last stage sent straight to the first
    stages: list[StageTime]
    repairs: list[dict[str, Any]]  # stages that were replaced while it was generated


class CompletionChoice(pydantic.BaseModel):
    index: int
    text: str
    logprobs: dict[str, list[Any]] | None
    finish_reason: str | None


class CompletionObject(pydantic.BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    shardmesh: list[ChoiceTimes]


class ChatChoice(pydantic.BaseModel):
    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: str


class ChatObject(pydantic.BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    shardmesh: list[ChoiceTimes]


def _with_stream(model: type[pydantic.BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {
        200: {
            "model": model,
            "description": "The answer; with `stream`, its pieces as events.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    }


COMPLETION_ANSWERS = _with_stream(CompletionObject)
CHAT_ANSWERS = _with_stream(ChatObject)

_REFUSALS = {
    400: "The request cannot be used.",
    401: "A token is needed, or is not known.",
    403: "This Host or Origin is not admitted.",
    404: "There is no such thing.",
    408: "The request did not arrive in time.",
    413: "The request is too large.",
    429: "Too many requests with this token; `Retry-After` says when to come again.",
    500: "A defect of the gateway, or of a node.",
    501: "What serves this model cannot do that.",
    503: "No room, or layers that nobody serves; `Retry-After` says when to come again.",
}

ERROR_ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _REFUSALS.items()
}
"""What any route may answer; all in the same shape."""
