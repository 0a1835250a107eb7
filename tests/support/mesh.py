"""A mesh of real stages with fake engines in one process, joined by real links over memory.

Each stage may have several replicas, which a test kills, freezes and brings back.  With a
`LoopWorker` and trio's MockClock nothing in it depends on real time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import MappingProxyType

import msgspec
import trio
import trio.testing
from support.replicas import replica

from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.replacements import ReplicaFinder, ReplicaHealth
from shardmesh.coordinator.router import SessionRouter
from shardmesh.coordinator.session import Session
from shardmesh.engine.base import Engine
from shardmesh.errors import UnreachableError
from shardmesh.links.link import Link, LinkUser
from shardmesh.listener.stage import MakeWorker, Stage
from shardmesh.listener.stage_session import StageIdentity
from shardmesh.listener.worker import Worker
from shardmesh.wire.messages import NextStage, Sampling
from shardmesh.wire.sealing import KeyExchange, new_link_id

DIGEST = "d" * 64
COORDINATOR = "coordinator"
PIECE_TOKENS = 32
"""Of the fake model's prompts."""

GREEDY = Sampling(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    typical_p=1.0,
    repeat_penalty=1.0,
    repeat_last_n=64,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    seed=0,
    logit_bias=(),
    n_top_logprobs=0,
)


RANDOM = msgspec.structs.replace(GREEDY, temperature=1.0, repeat_last_n=0)


async def written_tokens(
    session: Session,
    prompt: Sequence[int],
    n_tokens: int,
    before: Mapping[int, Callable[[], None]] = MappingProxyType({}),
) -> list[int]:
    """So many tokens behind a prompt, one after the other; calls `before[n]` when n have come."""
    done = await prefill(session, prompt)
    assert done.sampled is not None
    tokens = [done.sampled.token]
    while len(tokens) < n_tokens:
        if len(tokens) in before:
            before[len(tokens)]()
        session.send([tokens[-1]], sample=True)
        done = await session.receive()
        assert done.sampled is not None
        tokens.append(done.sampled.token)
    return tokens


class GatedStream(trio.abc.Stream):
    """A stream of a node that can be frozen: nothing gets in or out until it thaws."""

    def __init__(self, stream: trio.abc.Stream, is_thawed: Callable[[], trio.Event]) -> None:
        self._stream = stream
        self._is_thawed = is_thawed

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._is_thawed().wait()
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._is_thawed().wait()
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        await self._is_thawed().wait()
        return data

    async def aclose(self) -> None:
        await self._stream.aclose()


def link_ends(
    dialer: LinkUser,
    acceptor: LinkUser,
    *,
    names: tuple[str, str],
    streams: tuple[trio.abc.Stream, trio.abc.Stream],
) -> tuple[Link, Link]:
    """Two ends of one link that have not greeted; `names` are (dialer's, acceptor's) peer ids."""
    here, there = KeyExchange(), KeyExchange()
    link_id = new_link_id()
    keys = here.agree(there.public_key, link_id=link_id, dialer=names[0], acceptor=names[1])
    return (
        Link(streams[0], keys, is_dialer=True, peer_id=names[1], user=dialer),
        Link(streams[1], keys, is_dialer=False, peer_id=names[0], user=acceptor),
    )


async def linked_pair(
    nursery: trio.Nursery,
    dialer: LinkUser,
    acceptor: LinkUser,
    *,
    names: tuple[str, str],
    streams: tuple[trio.abc.Stream, trio.abc.Stream] | None = None,
) -> tuple[Link, Link]:
    """Two ends of one running link over memory; `names` are (dialer's, acceptor's) peer ids."""
    streams = streams or trio.testing.memory_stream_pair()
    ends = link_ends(dialer, acceptor, names=names, streams=streams)
    async with trio.open_nursery() as greeting:
        for end in ends:
            greeting.start_soon(end.greet)
    for end in ends:
        nursery.start_soon(end.run)
    return ends


@dataclasses.dataclass
class MemoryNode:
    """One replica: its stage, and what a test does to it."""

    stage: Stage
    replica: Replica
    thawed: trio.Event
    scope: trio.CancelScope = dataclasses.field(default_factory=trio.CancelScope)
    links: list[Link] = dataclasses.field(default_factory=list)  # both ends of all its links
    is_alive: bool = True


class MemoryMesh:
    """Nodes and a coordinator's router with a link to the first replica of each stage.

    The first replica of stage 2 is `stage-2`, its second one `stage-2-1`.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        nursery: trio.Nursery,
        spares: Sequence[Sequence[Engine]] = (),
        make_worker: MakeWorker = Worker,
    ) -> None:
        self.nursery = nursery
        self.router = SessionRouter()
        self.health = ReplicaHealth()
        self.nodes: dict[str, MemoryNode] = {}
        self.links: list[Link] = []
        self._make_worker = make_worker
        self._between: dict[tuple[str, str], Link] = {}
        self._n_layer = sum(engine.info.n_layer for engine in engines)
        start = 0
        for number, engine in enumerate(engines):
            self.add(f"stage-{number}", engine, number, start)
            for i, spare in enumerate(spares[number] if number < len(spares) else (), start=1):
                self.add(f"stage-{number}-{i}", spare, number, start)
            start += engine.info.n_layer
        names = [f"stage-{number}" for number in range(len(engines))]
        self.stages = [self.nodes[name].stage for name in names]
        self.chain = Chain(tuple(self.nodes[name].replica for name in names))

    def add(self, name: str, engine: Engine, number: int, layer_start: int) -> MemoryNode:
        """A node that is not started yet."""
        layer_end = layer_start + engine.info.n_layer
        identity = StageIdentity(DIGEST, layer_start, layer_end)
        stage = Stage(engine, identity, self.nursery, self._get_link_from(name), self._make_worker)
        known = replica(
            name,
            layer_start,
            layer_end,
            model_name="fake",
            manifest_digest=DIGEST,
            shard_id=number,
            n_layer=self._n_layer,
            n_ctx=engine.info.n_ctx,
            fingerprint=engine.info.fingerprint,
        )
        thawed = trio.Event()
        thawed.set()
        self.nodes[name] = MemoryNode(stage, known, thawed)
        return self.nodes[name]

    def start(self, name: str) -> None:
        self.nursery.start_soon(self._run, self.nodes[name])

    async def connect(self) -> None:
        for name in self.nodes:
            self.start(name)
        self.links = [await self.link(COORDINATOR, s.peer_id) for s in self.chain.stages]

    async def _run(self, node: MemoryNode) -> None:
        with node.scope:
            await node.stage.run()

    async def link(self, name: str, other: str) -> Link:
        """The open link from a node, or the coordinator, to a node, made if there is none.

        As in the product, a stage dials a silent node anew, and a coordinator looks elsewhere.
        """
        link = self._between.get((name, other))
        is_open = link is not None and link.is_open
        if link is not None and is_open and link.is_suspected and name == COORDINATOR:
            raise UnreachableError(f"{other} is silent", code="LINK_SILENT")
        if link is None or not is_open or link.is_suspected:
            link = await self.dial(name, other)
            self._between[name, other] = link
        return link

    async def dial(self, name: str, other: str) -> Link:
        """A new link from a node, or the coordinator, to a node."""
        there = self.nodes[other]
        if not there.is_alive:
            raise UnreachableError(f"no link to {other}", code="NO_LINK")
        ends = trio.testing.memory_stream_pair()
        streams: list[trio.abc.Stream] = []
        for owner, stream in zip((name, other), ends, strict=True):
            node = self.nodes.get(owner)
            streams.append(stream if node is None else _gated(stream, node))
        user = self.router if name == COORDINATOR else self.nodes[name].stage
        near, far = link_ends(
            user, there.stage, names=(name, other), streams=(streams[0], streams[1])
        )
        self.nursery.start_soon(_greet_and_run, far)
        await near.greet()
        self.nursery.start_soon(near.run)
        for owner in (name, other):
            if owner in self.nodes:
                self.nodes[owner].links += [near, far]
        return near

    def _get_link_from(self, name: str):  # type: ignore[no-untyped-def]
        async def get_link(target: NextStage) -> Link:
            return await self.link(name, target.peer_id)

        return get_link

    def link_between(self, number: int) -> Link:
        """The link from stage `number` to the next one, first replicas of both."""
        return self._between[f"stage-{number}", f"stage-{number + 1}"]

    # -- faults --------------------------------------------------------------------------------

    def kill(self, name: str) -> None:
        """The node's process is gone: all its links end at both sides."""
        node = self.nodes[name]
        node.is_alive = False
        node.scope.cancel()
        for link in node.links:
            link.close(UnreachableError("the connection broke", code="LINK_LOST"))
        node.links.clear()

    def drop(self, name: str) -> None:
        """All links of the node end; it can be reached again at once, and holds nothing."""
        for link in self.nodes[name].links:
            link.close(UnreachableError("the connection broke", code="LINK_LOST"))
        self.nodes[name].links.clear()

    def forget_link(self, name: str, other: str) -> Link:
        """Whoever asks for this link next gets a new one; the old one, which stays open."""
        return self._between.pop((name, other))

    def freeze(self, name: str) -> None:
        """SIGSTOP: nothing that is sent to it is read and nothing that it sends comes out."""
        self.nodes[name].thawed = trio.Event()

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        self.nodes[name].thawed.set()

    # -- recovery ------------------------------------------------------------------------------

    def known(self) -> list[Replica]:
        return [node.replica for node in self.nodes.values() if node.is_alive]

    def replacements(self, timeout_s: float = 10.0) -> ReplicaFinder:
        """For `router.session`: other replicas of this mesh."""

        async def connect(replica: Replica) -> Link:
            return await self.link(COORDINATOR, replica.peer_id)

        return ReplicaFinder(
            known=self.known,
            refresh=trio.lowlevel.checkpoint,
            connect=connect,
            health=self.health,
            timeout_s=timeout_s,
        )


async def _greet_and_run(link: Link) -> None:
    try:
        await link.greet()
    except UnreachableError:
        return  # whoever dials a frozen node waits in vain
    await link.run()


def _gated(stream: trio.abc.Stream, node: MemoryNode) -> GatedStream:
    return GatedStream(stream, lambda: node.thawed)


@asynccontextmanager
async def memory_mesh(
    engines: Sequence[Engine],
    spares: Sequence[Sequence[Engine]] = (),
    make_worker: MakeWorker = Worker,
) -> AsyncIterator[MemoryMesh]:
    """A running mesh; everything it started is gone at the end."""
    async with trio.open_nursery() as nursery:
        mesh = MemoryMesh(engines, nursery, spares, make_worker)
        await mesh.connect()
        yield mesh
        nursery.cancel_scope.cancel()
