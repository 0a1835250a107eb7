"""The console's real page, feed and events over a mesh that exists only in this process.

Runs in a thread of its own; `call` does something on its trio loop.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import msgspec
import trio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from support.roster import LAYERS, announced, peer_id_of_number

from shardmesh.coordinator.chain import Chain
from shardmesh.coordinator.coordinator import replica_of
from shardmesh.swarm.directory import Directory
from shardmesh.web.console import Console
from shardmesh.web.console_routes import page, router
from shardmesh.web.event_store import open_event_store
from shardmesh.web.events import EventHub
from shardmesh.web.guard import Guard, GuardSettings
from shardmesh.web.roster import Report
from shardmesh.web.server import bind_sockets, serve_app
from shardmesh.web.sessions import SessionBoard
from shardmesh.web.tokens import ApiTokens
from shardmesh.web.watch import MeshWatch
from shardmesh.wire.announcement import Announcement
from shardmesh.wire.messages import StageTiming

T = TypeVar("T")

START_TIMEOUT_S = 30.0
ANSWER = (
    "The king had **three daughters**, and each of them a room in the tower.\n\n"
    "1. The eldest kept *birds*.\n2. The second kept the keys.\n3. The youngest kept `silence`.\n\n"
    "One evening a stranger came to the gate and asked for bread.\n"
)


class Announced:
    """A directory of announcements that nobody had to sign."""

    def __init__(self) -> None:
        self.known: dict[str, Announcement] = {}
        self.left: set[str] = set()
        self.version = 0
        self._changed = trio.Event()

    def all(self) -> list[Announcement]:
        return sorted(self.known.values(), key=lambda a: (a.shard_id, a.peer_id))

    def has_left(self, peer_id: str) -> bool:
        return peer_id in self.left

    async def wait_changed(self, since: int | None = None) -> int:
        since = self.version if since is None else since
        while self.version <= since:
            await self._changed.wait()
        return self.version

    def tell(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = trio.Event()


class SyntheticMesh:
    """Nodes, reports and sessions to change as a test likes; on the server's trio loop only."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.directory = Announced()
        self.reports: dict[str, Report] = {}
        self.links: dict[str, str] = {}  # of published models, by manifest digest
        self.hub = EventHub()
        self.sessions = SessionBoard(clock=trio.current_time)
        self.watch = MeshWatch(
            cast(Directory, self.directory),
            self.hub,
            reports=self.reports,
            is_busy=lambda peer_id: self.sessions.n_running_on(peer_id) > 0,
        )
        self.tokens_per_s = 80.0
        self.answer = ANSWER
        self.asked: list[dict[str, Any]] = []
        self._numbers = itertools.count(1)

    def add(self, *numbers: int, loaded: bool = True, **changes: object) -> None:
        """Nodes join; their numbers say which shard they serve."""
        for number in numbers:
            one = announced(number, loaded=loaded, **changes)
            self.directory.known[one.peer_id] = one
            self.directory.left.discard(one.peer_id)
            self.reports[one.peer_id] = Report(
                round_trip_ms=0.4 + (number * 37 % 50) / 10,
                shard_state="loaded" if loaded else "absent",
                memory_bytes=(200 + number * 13 % 300) << 20,
                tokens_per_s=(71.5 + number * 7 % 30) if loaded else 0.0,
            )
        self.directory.tell()

    def place(self, announcements: list[Announcement]) -> None:
        """Nodes that a test has made itself."""
        for one in announcements:
            self.directory.known[one.peer_id] = one
            self.reports[one.peer_id] = Report(round_trip_ms=1.0 + hash(one.peer_id) % 70 / 10)
        self.directory.tell()

    def lose(self, number: int, *, goodbye: bool = False) -> None:
        """A node is gone."""
        peer_id = peer_id_of_number(number)
        del self.directory.known[peer_id]
        if goodbye:
            self.directory.left.add(peer_id)
        self.directory.tell()

    def report(self, number: int, **fields: Any) -> None:
        """What a node answers from now on."""
        peer_id = peer_id_of_number(number)
        self.reports[peer_id] = Report(**fields)
        self.watch.touch()

    def change(self, number: int, **changes: object) -> None:
        """A node announces itself anew."""
        peer_id = peer_id_of_number(number)
        known = self.directory.known[peer_id]
        self.directory.known[peer_id] = msgspec.structs.replace(known, **changes)
        self.directory.tell()

    def chain(self) -> Chain:
        """The first node of each stage."""
        stages: dict[int, Announcement] = {}
        for one in self.directory.all():
            if one.capabilities.shard_loaded:
                stages.setdefault(one.layer_start, one)
        return Chain(tuple(replica_of(stages[start]) for start in sorted(stages)))

    async def write(
        self, session_id: str, n_prompt_tokens: int, n_tokens: int
    ) -> AsyncGenerator[int, None]:
        """A session that writes; gives the number of each token."""
        chain = self.chain()
        session = self.sessions.start(session_id, chain, n_prompt_tokens)
        try:
            await trio.sleep(0.12)
            for number in range(n_tokens):
                session.token(timings(chain, number), 90.0)
                yield number
                await trio.sleep(1 / self.tokens_per_s)
            session.finish("stop")
        finally:
            session.finish("cancelled")

    def keep_busy(self, n_sessions: int) -> None:
        """Sessions that write without an end."""

        async def write(number: int) -> None:
            async for _ in self.write(f"busy-{number}-{next(self._numbers)}", 20, 10**9):
                pass

        for number in range(n_sessions):
            self.nursery.start_soon(write, number)

    def routes(self, app: FastAPI) -> None:
        """A gateway's answers, as far as the console asks for them."""

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            return self._answer(await request.json(), "chat.completion.chunk")

        @app.post("/v1/completions")
        async def text(request: Request) -> Any:
            return self._answer(await request.json(), "text_completion")

    def _answer(self, body: dict[str, Any], kind: str) -> Any:
        self.asked.append(body)
        if self.answer == "no template" and kind != "text_completion":
            error = {"message": "the model has no chat template", "code": "BAD_INPUT"}
            return JSONResponse({"error": error}, status_code=400)
        session_id = f"chatcmpl-{next(self._numbers)}"
        words = [f"{word} " for word in self.answer.split(" ")]

        async def stream() -> AsyncIterator[str]:
            def chunk(choices: list[dict[str, Any]], **members: Any) -> str:
                body = {"id": session_id, "object": kind, "choices": choices, **members}
                return f"data: {json.dumps(body)}\n\n"

            async with aclosing(self.write(session_id, 12, len(words))) as numbers:
                async for number in numbers:
                    piece = words[number]
                    is_text = kind == "text_completion"
                    content = {"text": piece} if is_text else {"delta": {"content": piece}}
                    yield chunk([{"index": 0, "finish_reason": None, **content}])
            yield chunk([{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}])
            yield chunk([], usage={"prompt_tokens": 12, "completion_tokens": len(words)})
            yield "data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")


def timings(chain: Chain, number: int) -> tuple[StageTiming, ...]:
    """Plausible reports of all stages for one token."""
    return tuple(
        StageTiming(
            layer_start=stage.layer_start,
            layer_end=stage.layer_end,
            queue_us=int(60 + 40 * math.sin(number / 7 + at)),
            compute_us=450 + 420 * (stage.layer_end - stage.layer_start),
            next_hop_us=120 + 60 * at,
        )
        for at, stage in enumerate(chain.stages)
    )


def large_mesh(n_stages: int, n_replicas: int) -> list[Announcement]:
    """Announcements of a big mesh, two layers a stage."""
    return [
        msgspec.structs.replace(
            announced(stage * n_replicas + replica, 0),
            shard_id=stage,
            total_shards=n_stages,
            total_layers=2 * n_stages,
            layer_start=2 * stage,
            layer_end=2 * stage + 2,
            model_name="a large model",
            manifest_digest="cd" * 32,
        )
        for stage in range(n_stages)
        for replica in range(n_replicas)
    ]


class ConsoleServer:
    """A running server; made by `console_server`."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.url = ""
        self.mesh: SyntheticMesh
        self._tokens = ApiTokens(tokens)
        self._token: trio.lowlevel.TrioToken
        self._scope: trio.CancelScope
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run,), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S), "the server did not start"

    def stop(self) -> None:
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(START_TIMEOUT_S)
        assert not self._thread.is_alive()

    def call(self, work: Callable[[SyntheticMesh], T]) -> T:
        """Does something with the mesh, on its loop."""
        return trio.from_thread.run_sync(work, self.mesh, trio_token=self._token)

    async def _run(self) -> None:
        store = await open_event_store(None)
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            self.mesh = mesh = SyntheticMesh(nursery)
            join = "shardmesh listen --cluster demo --bootstrap /ip4/192.168.1.10/tcp/51820"
            about = {"node_id": "me", "cluster": "demo", "version": "0", "join": join}
            about |= {"join_by_link": "shardmesh listen --cluster demo"}
            console = Console(
                mesh.watch, mesh.sessions, mesh.hub, store, about=about, links=mesh.links
            )
            app = FastAPI()
            app.state.gateway = SimpleNamespace(console=console)
            app.include_router(router)
            app.include_router(page)
            mesh.routes(app)
            sockets = bind_sockets("127.0.0.1", [0])
            port = sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}/"
            guard = GuardSettings(tokens=self._tokens, ports=frozenset({port}))
            self._token = trio.lowlevel.current_trio_token()
            nursery.start_soon(console.run)
            nursery.start_soon(serve_app, Guard(app, guard, {}), sockets)
            self._ready.set()
        await store.close()


@contextmanager
def console_server(tokens: Sequence[str] = ()) -> Iterator[ConsoleServer]:
    """A server on a free port of loopback, gone at the end of the block."""
    server = ConsoleServer(tokens)
    server.start()
    try:
        yield server
    finally:
        server.stop()


N_STAGES = len(LAYERS)
