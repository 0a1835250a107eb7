from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.types import Message

from shardmesh.web.errors import NotAllowedError, handle_errors
from shardmesh.web.guard import Guard, GuardSettings, check_host, check_origin
from shardmesh.web.tokens import ApiTokens
from shardmesh.wire.limits import HTTP_BODY_BYTES_MAX

TOKEN = "x" * 32


def guarded(**settings: Any) -> Guard:
    app = FastAPI()
    handle_errors(app)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, str]:
        return {"caller": request.state.caller}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.post("/v1/completions")
    async def completions(request: Request) -> dict[str, int]:
        return {"n_bytes": len(await request.body())}

    settings.setdefault("tokens", ApiTokens())
    return Guard(app, GuardSettings(**settings), {"X-Node-ID": "me"})


async def ask(
    guard: Guard,
    path: str = "/v1/models",
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    content: Any = None,
    host: str = "127.0.0.1:8080",
) -> httpx.Response:
    transport = httpx.ASGITransport(guard)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
        return await client.request(method, path, headers=headers, content=content)


async def test_every_answer_names_the_node() -> None:
    guard = guarded(tokens=ApiTokens([TOKEN]))
    for path in ("/health", "/v1/models", "/nowhere"):
        assert (await ask(guard, path)).headers["X-Node-ID"] == "me"


async def test_without_tokens_nobody_needs_one() -> None:
    assert (await ask(guarded())).json() == {"caller": "anybody"}


async def test_a_token_is_needed_where_there_are_some() -> None:
    guard = guarded(tokens=ApiTokens([f"alice:{TOKEN}", "bob:" + "y" * 16]))
    for given in ({}, {"Authorization": "Bearer nix"}, {"Authorization": f"Basic {TOKEN}"}):
        answer = await ask(guard, headers=given)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "NO_API_TOKEN"
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    good = await ask(guard, headers={"Authorization": f"Bearer {TOKEN}"})
    assert good.json() == {"caller": "alice"}
    assert (await ask(guard, "/health")).status_code == 200, "the health is for everybody"


async def test_a_token_can_do_what_it_has_the_rights_for() -> None:
    guard = guarded(tokens=ApiTokens([f"grafana/read:{TOKEN}", "bot/inference:" + "y" * 16]))
    reads, infers = ({"Authorization": f"Bearer {t}"} for t in (TOKEN, "y" * 16))
    for headers in (reads, infers):
        assert (await ask(guard, headers=headers)).status_code == 200, "both may list the models"
    allowed = await ask(guard, "/v1/completions", method="POST", headers=infers)
    assert allowed.status_code == 200
    for path, method, headers, needed in (
        ("/v1/completions", "POST", reads, "inference"),
        ("/v1/peers", "GET", infers, "read"),
        ("/v1/nodes/x/shard", "DELETE", reads, "operate"),
    ):
        refused = await ask(guard, path, method=method, headers=headers)
        assert refused.status_code == 403
        assert refused.json()["error"]["code"] == "TOKEN_RIGHTS"
        assert f"`{needed}`" in refused.json()["error"]["message"]


async def test_a_page_is_told_that_its_token_may_not_look() -> None:
    guard = guarded(tokens=ApiTokens([f"bot/inference:{TOKEN}"]), ports=frozenset({8080}))
    encoded = base64.urlsafe_b64encode(TOKEN.encode()).decode().rstrip("=")
    protocols = ["shardmesh", f"bearer.{encoded}"]
    _, closed = await websocket(guard, origin="http://127.0.0.1:8080", protocols=protocols)
    assert (closed["type"], closed["code"]) == ("websocket.close", 4403)


async def test_so_many_requests_a_minute() -> None:
    guard = guarded(tokens=ApiTokens([TOKEN, "y" * 16]), rate_per_minute=2)

    async def post(token: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"}
        return await ask(guard, "/v1/completions", method="POST", headers=headers)

    assert [(await post(TOKEN)).status_code for _ in range(3)] == [200, 200, 429]
    refused = await post(TOKEN)
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert (await post("y" * 16)).status_code == 200, "another token has its own share"


async def test_a_body_that_says_that_it_is_too_large() -> None:
    headers = {"Content-Length": str(HTTP_BODY_BYTES_MAX + 1)}
    answer = await ask(guarded(), "/v1/completions", method="POST", headers=headers, content=b"")
    assert answer.status_code == 413


async def test_a_body_that_does_not_say_it() -> None:
    async def endless():  # type: ignore[no-untyped-def]
        for _ in range(HTTP_BODY_BYTES_MAX // 65536 + 2):
            yield bytes(65536)

    answer = await ask(guarded(), "/v1/completions", method="POST", content=endless())
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "BODY_TOO_LARGE"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "", "127.0.0.1.evil.example"]
)
def test_foreign_host_names_are_refused(host: str) -> None:
    with pytest.raises(NotAllowedError):
        check_host(host, frozenset({"mesh.home"}))


@pytest.mark.parametrize(
    "host", ["localhost:8080", "127.0.0.1", "[::1]:8080", "10.0.0.7:1", "mesh.home"]
)
def test_addresses_and_listed_names_are_served(host: str) -> None:
    check_host(host, frozenset({"mesh.home"}))


SETTINGS = GuardSettings(
    tokens=ApiTokens(), ports=frozenset({8080, 8081}), origins=frozenset({"https://chat.example"})
)


@pytest.mark.parametrize(
    "origin",
    [None, "http://127.0.0.1:8080", "http://127.0.0.1:8081", "https://chat.example"],
)
def test_own_and_listed_pages_may_ask(origin: str | None) -> None:
    check_origin(origin, "127.0.0.1:8081", SETTINGS)


@pytest.mark.parametrize(
    "origin",
    ["null", "http://evil.example", "http://127.0.0.1:9", "http://localhost:8080", "http://[", "ä"],
)
def test_pages_of_others_may_not(origin: str) -> None:
    with pytest.raises(NotAllowedError):
        check_origin(origin, "127.0.0.1:8080", SETTINGS)


async def test_cors_for_a_listed_origin_only() -> None:
    guard = guarded(origins=frozenset({"https://chat.example"}))
    headers = {
        "Origin": "https://chat.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = await ask(guard, method="OPTIONS", headers=headers)
    assert preflight.status_code == 204
    assert preflight.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
    other = await ask(
        guard, method="OPTIONS", headers={**headers, "Origin": "https://evil.example"}
    )
    assert other.status_code == 403
    assert "Access-Control-Allow-Origin" not in other.headers


async def websocket(guard: Guard, *, origin: str, protocols: list[str]) -> list[Message]:
    """What a page that opens a WebSocket is answered."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": "/ws",
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8080"), (b"origin", origin.encode())],
        "subprotocols": protocols,
        "client": ("127.0.0.1", 1),
    }
    await guard(scope, receive, send)
    return sent


async def test_a_websocket_without_a_token_is_told_why() -> None:
    guard = guarded(tokens=ApiTokens([TOKEN]), ports=frozenset({8080}))
    own = "http://127.0.0.1:8080"
    accepted, closed = await websocket(guard, origin=own, protocols=["shardmesh"])
    assert accepted["type"] == "websocket.accept"
    assert (closed["type"], closed["code"]) == ("websocket.close", 4401)
    encoded = base64.urlsafe_b64encode(TOKEN.encode()).decode().rstrip("=")
    known = await websocket(guard, origin=own, protocols=["shardmesh", f"bearer.{encoded}"])
    assert 4401 not in [message.get("code") for message in known], "it reaches the application"


async def test_a_websocket_of_a_foreign_page_is_not_opened() -> None:
    guard = guarded(ports=frozenset({8080}))
    (refused,) = await websocket(guard, origin="http://evil.example", protocols=[])
    assert refused["type"] == "websocket.close"
