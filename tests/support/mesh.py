"""A chain of real stages with fake engines in one process, joined by real links over memory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio
import trio.testing

from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.coordinator.session import SessionRouter
from shardmesh.engine.base import Engine
from shardmesh.links.link import Link, LinkUser
from shardmesh.listener.stage import Stage
from shardmesh.listener.stage_session import StageIdentity
from shardmesh.wire.messages import NextStage, Sampling
from shardmesh.wire.sealing import KeyExchange, new_link_id

DIGEST = "d" * 64

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


async def linked_pair(
    nursery: trio.Nursery, dialer: LinkUser, acceptor: LinkUser, *, names: tuple[str, str]
) -> tuple[Link, Link]:
    """Two ends of one running link over memory; `names` are (dialer's, acceptor's) peer ids."""
    here, there = KeyExchange(), KeyExchange()
    link_id = new_link_id()
    keys = here.agree(there.public_key, link_id=link_id, dialer=names[0], acceptor=names[1])
    one, other = trio.testing.memory_stream_pair()
    ends = (
        Link(one, keys, is_dialer=True, peer_id=names[1], user=dialer),
        Link(other, keys, is_dialer=False, peer_id=names[0], user=acceptor),
    )
    async with trio.open_nursery() as greeting:
        for end in ends:
            greeting.start_soon(end.greet)
    for end in ends:
        nursery.start_soon(end.run)
    return ends


class MemoryMesh:
    """Stages `stage-0` ... and a coordinator's router with a link to each."""

    def __init__(self, engines: Sequence[Engine], nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.router = SessionRouter()
        self.stages: list[Stage] = []
        self.links: list[Link] = []
        self._between: dict[tuple[str, str], Link] = {}
        start = 0
        n_layer = sum(engine.info.n_layer for engine in engines)
        replicas = []
        for number, engine in enumerate(engines):
            end = start + engine.info.n_layer
            identity = StageIdentity(DIGEST, start, end)
            name = f"stage-{number}"
            self.stages.append(Stage(engine, identity, nursery, self._get_link_from(name)))
            replicas.append(
                Replica(
                    peer_id=name,
                    addresses=(),
                    model_name="fake",
                    manifest_digest=DIGEST,
                    shard_id=number,
                    layer_start=start,
                    layer_end=end,
                    n_layer=n_layer,
                    n_ctx=engine.info.n_ctx,
                    shard_loaded=True,
                    fingerprint=engine.info.fingerprint,
                )
            )
            start = end
        self.chain = Chain(tuple(replicas))

    async def connect(self) -> None:
        for number, stage in enumerate(self.stages):
            link, _ = await linked_pair(
                self.nursery, self.router, stage, names=("coordinator", f"stage-{number}")
            )
            self.links.append(link)
            self.nursery.start_soon(stage.run)

    def _get_link_from(self, name: str):  # type: ignore[no-untyped-def]
        async def get_link(target: NextStage) -> Link:
            key = (name, target.peer_id)
            if key not in self._between or not self._between[key].is_open:
                own = self.stages[int(name.split("-")[1])]
                other = self.stages[int(target.peer_id.split("-")[1])]
                self._between[key], _ = await linked_pair(self.nursery, own, other, names=key)
            return self._between[key]

        return get_link

    def link_between(self, number: int) -> Link:
        """The link from stage `number` to the next one."""
        return self._between[(f"stage-{number}", f"stage-{number + 1}")]


@asynccontextmanager
async def memory_mesh(engines: Sequence[Engine]) -> AsyncIterator[MemoryMesh]:
    """A running mesh; everything it started is gone at the end."""
    async with trio.open_nursery() as nursery:
        mesh = MemoryMesh(engines, nursery)
        await mesh.connect()
        yield mesh
        nursery.cancel_scope.cancel()
