"""Replicas that keep a copy of a session's KV, one for each stage that has another replica.

The coordinator names them: it tells the replica whose copy to take, and the stage where to send it.
All of it goes on beside the session and is left out where it does not work: a stage without a
standby is replaced as any other.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from typing import Protocol

import trio

from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.errors import ShardmeshError
from shardmesh.links.link import Link
from shardmesh.wire.messages import (
    CloseSession,
    CopyTo,
    NextStage,
    SessionFailed,
    StandBy,
    StandingBy,
)

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 5.0
LOOK_AGAIN_S = 5.0
"""A stage without a standby gets one as soon as the mesh has another replica that is willing."""

REFUSED_S = 30.0
"""A replica that would not stand by is not asked again for so long."""


class FindsStandbys(Protocol):
    """Where a session finds a standby for a stage."""

    async def standby(
        self, chain: Chain, number: int, n_ctx: int, without: Collection[str]
    ) -> tuple[Replica, Link] | None:
        """A replica that computes as that stage does, and a link to it; None: there is none."""
        ...


class HasStages(Protocol):
    """The stages of the session as they are now."""

    chain: Chain
    links: list[Link]


@dataclasses.dataclass(eq=False)
class _Standby:
    replica: Replica
    link: Link
    source: str  # peer id of the stage
    answered: trio.Event = dataclasses.field(default_factory=trio.Event)
    is_ready: bool = False


class Standbys:
    """The standbys of one session, by number of the stage."""

    def __init__(
        self, session_id: bytes, stages: HasStages, n_ctx: int, finder: FindsStandbys
    ) -> None:
        self._session_id = session_id
        self._stages = stages
        self._n_ctx = n_ctx
        self._finder = finder
        self._standbys: dict[int, _Standby] = {}
        self._refused_until_s: dict[str, float] = {}
        self._is_steady = False
        self._changed = trio.Event()
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Finds standbys until the session is closed."""
        with self._scope:
            while True:
                self._changed = trio.Event()
                for number in range(len(self._stages.links)):
                    if self._is_steady and number not in self._standbys:
                        await self._engage(number)
                with trio.move_on_after(LOOK_AGAIN_S):
                    await self._changed.wait()

    def ready(self) -> dict[int, Replica]:
        """Those that take copies now, by number of the stage."""
        return {n: each.replica for n, each in self._standbys.items() if each.is_ready}

    def peer_id_of(self, number: int) -> str | None:
        """Who stands by for a stage."""
        standby = self._standbys.get(number)
        return standby.replica.peer_id if standby is not None and standby.is_ready else None

    def pause(self) -> None:
        """The chain is being repaired: nobody is told anything meanwhile."""
        self._is_steady = False

    def go_on(self, fresh: Collection[int] = ()) -> None:
        """The stages are well again; `fresh` of them began anew, perhaps on other replicas."""
        self._is_steady = True
        for number, standby in list(self._standbys.items()):
            stage = self._stages.chain.stages[number]
            if stage.peer_id == standby.replica.peer_id:
                del self._standbys[number]  # it has taken over
            elif stage.peer_id != standby.source:
                self._dismiss(number)
            elif number in fresh and standby.is_ready:
                self._have_it_copied(number, standby)
        self._changed.set()

    def heard(self, link: Link, message: StandingBy | SessionFailed) -> None:
        """What a replica answers."""
        for number, standby in list(self._standbys.items()):
            if standby.link is not link:
                continue
            if isinstance(message, SessionFailed):
                error = message.error()
                logger.info("no standby: [%s] %s", error.code, error)
                self._refuse(number)
            standby.is_ready = isinstance(message, StandingBy)
            standby.answered.set()

    def lost(self, link: Link) -> None:
        """The link to a replica has ended, and what it kept is gone with it."""
        for number, standby in list(self._standbys.items()):
            if standby.link is link:
                del self._standbys[number]
                standby.answered.set()
        self._changed.set()

    def close(self) -> None:
        """The session is over: all copies are given up; not waited for."""
        self._scope.cancel()
        for number in list(self._standbys):
            self._dismiss(number)

    async def _engage(self, number: int) -> None:
        chain = self._stages.chain
        now_s = trio.current_time()
        refused = {peer_id for peer_id, s in self._refused_until_s.items() if s > now_s}
        found = await self._finder.standby(chain, number, self._n_ctx, refused)
        if found is None or not self._is_steady or self._stages.chain is not chain:
            return
        standby = _Standby(*found, source=chain.stages[number].peer_id)
        self._standbys[number] = standby
        try:
            standby.link.send(self._stand_by(chain.stages[number]))
        except ShardmeshError:
            self._refuse(number)
            return
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            await standby.answered.wait()
        if self._standbys.get(number) is not standby:
            return
        if not standby.is_ready:
            self._refuse(number)
        elif self._is_steady:
            self._have_it_copied(number, standby)

    def _stand_by(self, stage: Replica) -> StandBy:
        return StandBy(
            session=self._session_id,
            manifest_digest=stage.manifest_digest,
            layer_start=stage.layer_start,
            layer_end=stage.layer_end,
            n_ctx=self._n_ctx,
            fingerprint=stage.fingerprint,
            source=stage.peer_id,
        )

    def _have_it_copied(self, number: int, standby: _Standby) -> None:
        """Tells the stage where to send its KV; if it cannot be told, its loss is noticed."""
        replica = standby.replica
        message = CopyTo(
            session=self._session_id,
            standby=NextStage(peer_id=replica.peer_id, addresses=replica.addresses),
            fingerprint=replica.fingerprint,
        )
        try:
            self._stages.links[number].send(message)
        except ShardmeshError as error:
            logger.info("a stage was not told of its standby: [%s] %s", error.code, error)

    def _refuse(self, number: int) -> None:
        standby = self._standbys[number]
        self._refused_until_s[standby.replica.peer_id] = trio.current_time() + REFUSED_S
        self._dismiss(number)

    def _dismiss(self, number: int) -> None:
        """Gives a copy up."""
        standby = self._standbys.pop(number)
        standby.answered.set()
        if standby.link.is_open:
            try:
                standby.link.send(CloseSession(session=self._session_id))
            except ShardmeshError as error:
                # One that cannot be told forgets the copy when its link ends, so end it.
                standby.link.close(error)
