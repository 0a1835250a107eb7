"""Errors as OpenAI's clients know them: one shape, and the status that says whose fault it is."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from shardmesh.errors import (
    BusyError,
    IncompleteError,
    InputError,
    MomentError,
    OurError,
    RefusedError,
    ShardmeshError,
    known_error,
)

logger = logging.getLogger(__name__)

RETRY_BUSY_S = 1
RETRY_INCOMPLETE_S = 5
_ERRORS_SHOWN_MAX = 3
_SHOULD_BE = "Input should be "
_KIND = re.compile(r"str|int|float|bool|[A-Z]\w*|.*[^\w].*", re.ASCII | re.DOTALL)
"""Names of kinds: of plain ones, of classes, and what is put together, as in `list[int]`."""

_OPENAI_CODES = {
    "UNKNOWN_MODEL": "model_not_found",
    "PROMPT_TOO_LONG": "context_length_exceeded",
    "CONTEXT_TOO_LONG": "context_length_exceeded",
}
"""Codes that clients look for; all others are Shardmesh's own, of docs/operations.md."""

_STATUS_BY_CODE = {
    "UNKNOWN_MODEL": 404,
    "UNKNOWN_PEER": 404,
    "NO_API_TOKEN": 401,
    "RATE_LIMITED": 429,
    "BODY_TOO_SLOW": 408,
    "BODY_TOO_LARGE": 413,
    "NO_EMBEDDINGS": 501,
}

_HEADERS_BY_CODE = {
    "NO_API_TOKEN": {"WWW-Authenticate": "Bearer"},
    "BODY_TOO_SLOW": {"Connection": "close"},  # what is left of it must not be taken for a request
}


class ErrorDetail(pydantic.BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    next_step: str | None = None


class ErrorBody(pydantic.BaseModel):
    """An error in OpenAI's shape."""

    error: ErrorDetail


class RateLimitError(MomentError):
    """A token has asked for more than its share; `retry_s` says when to come again."""

    default_code = "RATE_LIMITED"

    def __init__(self, retry_s: float) -> None:
        super().__init__("too many requests with this token", next_step="send fewer a minute")
        self.retry_s = retry_s


class NotAllowedError(RefusedError):
    """A Host or Origin that is not admitted."""

    default_code = "ORIGIN_REFUSED"


def status_of(error: ShardmeshError) -> int:
    """The HTTP status of an error, by code and blame."""
    if error.code in _STATUS_BY_CODE:
        return _STATUS_BY_CODE[error.code]
    match error:
        case NotAllowedError():
            return 403
        case MomentError():
            return 503
        case OurError():
            return 500
        case _ if error.blame == "theirs":
            return 400
        case _:
            return 500


def body_of(error: ShardmeshError) -> dict[str, Any]:
    """The JSON of an error."""
    status = status_of(error)
    detail = ErrorDetail(
        message=str(error) + (f". Next step: {error.next_step}" if error.next_step else ""),
        type=_type_of(status),
        code=_OPENAI_CODES.get(error.code, error.code),
        next_step=error.next_step or None,
    )
    return {"error": detail.model_dump()}


def headers_of(error: ShardmeshError) -> dict[str, str]:
    """Headers that go with an error."""
    match error:
        case RateLimitError():
            return {"Retry-After": str(max(1, round(error.retry_s)))}
        case IncompleteError():
            return {"Retry-After": str(RETRY_INCOMPLETE_S)}
        case BusyError() | MomentError():
            return {"Retry-After": str(RETRY_BUSY_S)}
    return _HEADERS_BY_CODE.get(error.code, {})


def response_of(error: ShardmeshError) -> JSONResponse:
    """The answer that reports an error."""
    return JSONResponse(body_of(error), status_of(error), headers_of(error))


def handle_errors(app: FastAPI) -> None:
    """Has the app report every error in this shape."""
    app.add_exception_handler(ShardmeshError, _on_known)
    app.add_exception_handler(ExceptionGroup, _on_group)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_unknown)


async def _on_known(request: Request, error: Exception) -> JSONResponse:
    known = known_error(error)
    if known is None:
        return await _on_unknown(request, error)
    if isinstance(known, OurError):
        logger.error("%s: [%s] %s", request.url.path, known.code, known)
    return response_of(known)


_on_group = _on_known


async def _on_unknown(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s failed", request.url.path, exc_info=error)
    return response_of(OurError(f"the gateway failed: {type(error).__name__}"))


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    """A body or parameter that breaks the schema; says where, without repeating what came."""
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    if "json" not in request.headers.get("content-type", "json"):
        return _bad_input("send the body with `Content-Type: application/json`", "body")
    for each in errors:
        if each["type"] == "json_invalid":
            return _bad_json(f"the body is not valid JSON at character {each['loc'][-1]}")
    faults = faults_by_place(errors)
    named = [f"{place}: {fault}" for place, fault in faults.items()]
    sentence = "; ".join(named[:_ERRORS_SHOWN_MAX]) or "the request cannot be read"
    return _bad_input(sentence, next(iter(faults), None))


def faults_by_place(errors: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is wrong at each place, such as `messages.0.role`, out of what pydantic found.

    Of a value that may be of several kinds it says what is wrong for each of them; where the
    fault lies inside of one kind, nothing is said about the others.
    """
    said: dict[tuple[str, ...], list[str]] = {}
    for error in errors:
        said.setdefault(_place(error), []).append(error["msg"])
    deepest = {
        place: list(dict.fromkeys(messages))
        for place, messages in said.items()
        if not any(other != place and other[: len(place)] == place for other in said)
    }
    return {
        ".".join(place): " or ".join([first, *(text.removeprefix(_SHOULD_BE) for text in others)])
        for place, (first, *others) in deepest.items()
    }


def _bad_json(sentence: str) -> JSONResponse:
    return _bad_input(sentence, "body", code="BAD_JSON")


def _bad_input(sentence: str, param: str | None, *, code: str | None = None) -> JSONResponse:
    answer = body_of(InputError(sentence, code=code))
    answer["error"]["param"] = param
    return JSONResponse(answer, 400)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: no such path, no such method, a body that is no JSON."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 400:  # raised for nothing else
        return _bad_json("the body is not valid JSON: it is not UTF-8, or nested too deep")
    headers = dict((error.headers if isinstance(error, HTTPException) else None) or {})
    if headers.get("Allow") == "GET":  # the routes do not know that
        headers["Allow"] = "GET, HEAD"
    sentence = {404: "there is nothing at this path", 405: "this path does not take that method"}
    detail = ErrorDetail(
        message=sentence.get(status, str(getattr(error, "detail", error))),
        type=_type_of(status),
        code=None,
    )
    return JSONResponse({"error": detail.model_dump()}, status, headers)


def _place(error: Mapping[str, Any]) -> tuple[str, ...]:
    """Where in the request, without pydantic's names of the kinds that a value may be of."""
    parts = [str(part) for part in error["loc"]]
    return tuple(part for part in parts[1:] if not _KIND.fullmatch(part)) or (parts[0],)


def _type_of(status: int) -> str:
    """OpenAI's type for a status."""
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 429:
            return "rate_limit_error"
        case 503:
            return "service_unavailable"
    return "server_error" if status >= 500 else "invalid_request_error"
