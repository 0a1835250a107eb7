"""HEAD gives the head of what GET gives, and the connection goes on."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from fastapi import FastAPI, Request, Response

from shardmesh.web.errors import handle_errors
from shardmesh.web.guard import Guard, GuardSettings
from shardmesh.web.head import HeadAsGet
from shardmesh.web.server import bind_sockets, serve_app
from shardmesh.web.sse import EventStream, SendEvent
from shardmesh.web.tokens import ApiTokens

TIMEOUT_S = 10.0


def an_app() -> FastAPI:
    app = FastAPI()
    handle_errors(app)
    app.add_middleware(HeadAsGet)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "incomplete"}

    @app.get("/static/{name}")
    async def static(request: Request) -> Response:
        assert request.method == "GET"
        return Response(status_code=304, headers={"ETag": '"x"'})

    @app.get("/v1/events")
    async def events() -> Response:
        async def produce(send: SendEvent) -> None:
            while True:
                await send("again")

        return EventStream(produce)

    @app.post("/tokenize")
    async def tokenize() -> dict[str, str]:
        return {}

    return app


@contextmanager
def connected(port: int) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        yield connection
    finally:
        connection.close()


Head = tuple[int, dict[str, str]]


def ask(connection: http.client.HTTPConnection, method: str, path: str) -> tuple[Head, bytes]:
    connection.request(method, path)
    answer = connection.getresponse()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    headers.pop("date")
    is_endless = method == "GET" and path == "/v1/events"
    return (answer.status, headers), answer.read(1 if is_endless else None)


@pytest.mark.parametrize(
    "path", ["/health", "/static/x", "/v1/events", "/nowhere", "/tokenize", "/openapi.json"]
)
async def test_the_same_head_and_no_body(path: str) -> None:
    (bound,) = bind_sockets("127.0.0.1", [0])
    port = bound.getsockname()[1]

    def compare() -> None:
        with connected(port) as first, connected(port) as second:
            head, body = ask(first, "HEAD", path)
            assert body == b""
            assert head == ask(second, "GET", path)[0]
            assert ask(first, "GET", "/health")[1] == b'{"status":"incomplete"}'

    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            guard = Guard(an_app(), GuardSettings(tokens=ApiTokens()), {})
            nursery.start_soon(serve_app, guard, [bound])
            await trio.to_thread.run_sync(compare)
            nursery.cancel_scope.cancel()


async def test_what_allows_get_allows_head() -> None:
    (bound,) = bind_sockets("127.0.0.1", [0])
    port = bound.getsockname()[1]

    def compare() -> None:
        with connected(port) as connection:
            (status, headers), _ = ask(connection, "DELETE", "/health")
            assert (status, headers["allow"]) == (405, "GET, HEAD")
            (status, headers), _ = ask(connection, "HEAD", "/tokenize")
            assert (status, headers["allow"]) == (405, "POST")

    with trio.fail_after(TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_app, an_app(), [bound])
            await trio.to_thread.run_sync(compare)
            nursery.cancel_scope.cancel()
