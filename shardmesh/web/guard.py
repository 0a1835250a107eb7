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
from starlette.requests import ClientDisconnect
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
        else:
            body = _BoundedBody(receive, send)
            try:
                await self._app(scope, body.receive, body.send)
            except ClientDisconnect:  # gone while its body was read, or made to look so
                await body.refuse()

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


class _BoundedBody:
    """A request's body with an end and a deadline, whatever its headers said."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._n_bytes = 0
        self._is_over = False
        self._is_too_large = False
        self._is_refused = False
        self._deadline_s = trio.current_time() + HTTP_BODY_TIMEOUT_S

    async def receive(self) -> Message:
        if self._is_over:
            return await self._receive()
        with trio.move_on_at(self._deadline_s):
            message = await self._receive()
            self._n_bytes += len(message.get("body", b""))
            self._is_over = not message.get("more_body", False)
            if self._n_bytes <= HTTP_BODY_BYTES_MAX:
                return message
            self._is_too_large = True
        self._is_over = True
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self._is_too_large:
            await self._send(message)
        elif message["type"] == "http.response.start":
            await self.refuse()

    async def refuse(self) -> None:
        """Says that the body was too large, if it was and nobody has said so yet."""
        if self._is_too_large and not self._is_refused:
            self._is_refused = True
            error = response_of(_too_large())
            start = {"status": error.status_code, "headers": error.raw_headers}
            await self._send({"type": "http.response.start", **start})
            await self._send({"type": "http.response.body", "body": bytes(error.body)})
