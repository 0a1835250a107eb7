"""Who may ask what: Host, Origin, token, size and rate, before any route sees the request."""

from __future__ import annotations

import base64
import dataclasses
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

import trio
from fastapi.responses import Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shardmesh.errors import InputError, RefusedError, ShardmeshError
from shardmesh.web.errors import NotAllowedError, response_of
from shardmesh.web.rights import is_public, right_needed
from shardmesh.web.tokens import ApiTokens, RateLimits
from shardmesh.wire.limits import HTTP_BODY_BYTES_MAX, HTTP_BODY_TIMEOUT_S

_CORS_METHODS = "GET, POST, OPTIONS"
_CORS_MAX_AGE_S = 600
_CLOSE_POLICY = 1008  # RFC 6455 section 7.4.1
_CLOSES_TOLD = {"NO_API_TOKEN": 4401, "TOKEN_RIGHTS": 4403}
"""By error code, of the close codes that applications may use: a page shows these to a person."""

_TOKEN_PROTOCOL = "bearer."


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """Who is admitted; `rate_per_minute` 0 is without a limit."""

    tokens: ApiTokens
    hosts: frozenset[str] = frozenset()  # names besides addresses and localhost
    origins: frozenset[str] = frozenset()  # that pages of others may come from; "*" is any
    ports: frozenset[int] = frozenset()  # of this gateway, whose pages may talk to each
    rate_per_minute: int = 0


class Guard:
    """ASGI middleware around the whole application; adds `headers` to every answer."""

    def __init__(self, app: ASGIApp, settings: GuardSettings, headers: Mapping[str, str]) -> None:
        self._app = app
        self._settings = settings
        self._headers = headers
        self._rates = RateLimits(settings.rate_per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        request = Headers(scope=scope)
        send = self._marked(send, request.get("origin", ""))
        try:
            check_host(request.get("host", ""), self._settings.hosts)
            check_origin(request.get("origin"), request.get("host", ""), self._settings)
            if _is_preflight(scope, request):
                await _preflight(request)(scope, receive, send)
                return
            self._admit(scope, request)
            _check_length(request)
        except ShardmeshError as error:
            await _refuse(scope, receive, send, error)
            return
        if scope["type"] == "websocket":
            await self._app(scope, receive, send)
            return
        try:
            body = await _whole_body(receive)
        except InputError as error:
            await _refuse_unread(scope, receive, send, error)
            return
        if body is not None:
            await self._app(scope, _behind(body, receive), send)

    def _admit(self, scope: Scope, request: Headers) -> None:
        """Notes the caller in the scope; raises for one without a token or over its rate."""
        path: str = scope["path"]
        known = self._settings.tokens.caller(_token_in(scope, request))
        caller = "" if known is None else known.name
        if not is_public(path):
            if known is None:
                raise no_token()
            needed = right_needed(scope.get("method", "GET"), path)
            if needed is not None and needed not in known.rights:
                raise lacks_right(known.name, needed)
        scope.setdefault("state", {})["caller"] = caller
        if scope.get("method") == "POST":
            client = scope.get("client") or ("",)
            self._rates.take(caller or str(client[0]), trio.current_time())

    def _marked(self, send: Send, origin: str) -> Send:
        """Has every answer carry the node's headers, and CORS's for an origin that is listed."""
        origins = self._settings.origins
        is_listed = bool(origin) and (origin in origins or "*" in origins)

        async def send_marked(message: Message) -> None:
            if message["type"] in ("http.response.start", "websocket.accept"):
                headers = MutableHeaders(raw=list(message.get("headers", [])))
                for name, value in self._headers.items():
                    headers[name] = value
                headers["X-Content-Type-Options"] = "nosniff"
                if is_listed:
                    headers["Access-Control-Allow-Origin"] = origin
                    headers["Access-Control-Expose-Headers"] = ", ".join(self._headers)
                    headers.add_vary_header("Origin")
                message["headers"] = headers.raw
            await send(message)

        return send_marked


def no_token() -> RefusedError:
    return RefusedError(
        "a token is needed, and none or an unknown one was given",
        code="NO_API_TOKEN",
        next_step="send `Authorization: Bearer TOKEN`",
    )


def lacks_right(caller: str, needed: str) -> NotAllowedError:
    return NotAllowedError(
        f"the token of {caller} may not do this: it lacks the right `{needed}`",
        code="TOKEN_RIGHTS",
        next_step="use a token with this right, or give it to this one where the gateway starts",
    )


def check_host(host: str, names: frozenset[str]) -> None:
    """Raises NotAllowedError for a name that is not ours.

    A page of a stranger can make a browser look up its own name as this machine's address, and
    then counts as of the same origin; an address or `localhost` it cannot take for a name.
    """
    name = _host_name(host)
    if name == "localhost" or name in names or _is_address(name):
        return
    raise NotAllowedError(
        "this host name is not served here",
        code="HOST_REFUSED",
        next_step="start the gateway with --allowed-host and this name",
    )


def check_origin(origin: str | None, host: str, settings: GuardSettings) -> None:
    """Raises NotAllowedError for a page of another site, unless it is listed."""
    if origin is None or origin in settings.origins or "*" in settings.origins:
        return
    try:
        place = urlsplit(origin)
        own_ports = {_port(urlsplit(f"//{host}").port, place.scheme), *settings.ports}
        is_own = place.hostname == _host_name(host) and _port(place.port, place.scheme) in own_ports
    except ValueError:
        is_own = False
    if not is_own:
        raise NotAllowedError(
            "pages of this origin may not use the gateway",
            next_step="start it with --cors-origin and this origin",
        )


def _port(port: int | None, scheme: str) -> int:
    return port if port is not None else 443 if scheme == "https" else 80


def _host_name(host: str) -> str:
    """The name in a Host header, without its port; empty if it makes no sense."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _token_in(scope: Scope, request: Headers) -> str:
    """The token of a request; from a browser a WebSocket can have it as a subprotocol only."""
    scheme, _, token = request.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    for offered in scope.get("subprotocols") or ():
        if offered.startswith(_TOKEN_PROTOCOL):
            return _decode_token(offered.removeprefix(_TOKEN_PROTOCOL))
    return request.get("x-api-key", "")


def _decode_token(text: str) -> str:
    """A token in base64url without padding, as subprotocols can carry it; empty if it is none."""
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode("utf-8")
    except ValueError:
        return ""


def _check_length(request: Headers) -> None:
    length = request.get("content-length", "0")
    if length.isdecimal() and int(length) > HTTP_BODY_BYTES_MAX:
        raise _too_large()


def _too_large() -> InputError:
    return InputError(
        f"the request has more than {HTTP_BODY_BYTES_MAX} bytes", code="BODY_TOO_LARGE"
    )


def _is_preflight(scope: Scope, request: Headers) -> bool:
    """Asked by a browser before a page of another site may ask itself; never has a token."""
    return scope.get("method") == "OPTIONS" and "access-control-request-method" in request


def _preflight(request: Headers) -> Response:
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": _CORS_METHODS,
            "Access-Control-Allow-Headers": request.get("access-control-request-headers", ""),
            "Access-Control-Max-Age": str(_CORS_MAX_AGE_S),
        },
    )


async def _refuse(scope: Scope, receive: Receive, send: Send, error: ShardmeshError) -> None:
    if scope["type"] == "http":
        await response_of(error)(scope, receive, send)
        return
    await receive()
    if error.code not in _CLOSES_TOLD:
        await send({"type": "websocket.close", "code": _CLOSE_POLICY, "reason": error.code})
        return
    # Opened first: a page cannot tell why a socket was never opened.
    own = [each for each in scope.get("subprotocols") or () if not each.startswith(_TOKEN_PROTOCOL)]
    await send({"type": "websocket.accept", "subprotocol": own[0] if own else None})
    close = {"code": _CLOSES_TOLD[error.code], "reason": error.code}
    await send({"type": "websocket.close", **close})


async def _whole_body(receive: Receive) -> bytes | None:
    """A request's body, whatever its headers said; None if the client goes away before its end.

    Read before any route runs: the connection waits until what it has read is taken, and a route
    that takes nothing would wait for the connection in the end, for ever.  Raises InputError
    (theirs) for one that is too large or does not come in time.
    """
    body, has_more = bytearray(), True
    try:
        with trio.fail_after(HTTP_BODY_TIMEOUT_S):
            while has_more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body += message.get("body", b"")
                if len(body) > HTTP_BODY_BYTES_MAX:
                    raise _too_large()
                has_more = message.get("more_body", False)
    except trio.TooSlowError:
        raise InputError(
            f"the body of the request did not arrive within {HTTP_BODY_TIMEOUT_S:.0f} s",
            code="BODY_TOO_SLOW",
            next_step="send it over a faster line, or make it shorter",
        ) from None
    return bytes(body)


def _behind(body: bytes, receive: Receive) -> Receive:
    """Gives the body at once, then what comes behind it."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_behind() -> Message:
        return first.pop() if first else await receive()

    return receive_behind


async def _refuse_unread(scope: Scope, receive: Receive, send: Send, error: ShardmeshError) -> None:
    """Answers while the rest of the body is taken and dropped."""

    async def drop() -> None:
        while True:
            await receive()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drop)
        await _refuse(scope, receive, send, error)
        nursery.cancel_scope.cancel()
