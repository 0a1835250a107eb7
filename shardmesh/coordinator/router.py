"""Which session a message of a stage is for."""

from __future__ import annotations

import dataclasses
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from shardmesh.coordinator.chain import Chain
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.session import Session
from shardmesh.coordinator.stages import (
    INBOX_MESSAGES_MAX,
    Event,
    Replacements,
    SessionStages,
    StageMessage,
    Suspected,
)
from shardmesh.coordinator.standbys import Standbys
from shardmesh.errors import ProtocolError, ShardmeshError
from shardmesh.links.link import Link
from shardmesh.wire.messages import Message, SessionFailed, StandingBy

N_SUSPICIONS_MAX = 64
"""Suspicions that a session has not looked at yet; a link may come under suspicion repeatedly."""


@dataclasses.dataclass(frozen=True)
class _Route:
    inbox: trio.MemorySendChannel[tuple[Link, Event]]
    links: list[Link]  # the session's own list, which it changes
    standbys: Standbys | None = None

    @property
    def n_waiting(self) -> int:
        return self.inbox.statistics().current_buffer_used


class SessionRouter:
    """Hands what comes over the links of a coordinator to the sessions it concerns."""

    def __init__(self) -> None:
        self._routes: dict[bytes, _Route] = {}

    @property
    def n_sessions(self) -> int:
        return len(self._routes)

    def n_sessions_by_peer(self) -> Counter[str]:
        """How many sessions each node takes part in, by peer id."""
        return Counter(link.peer_id for route in self._routes.values() for link in route.links)

    def on_message(self, link: Link, message: Message, body: memoryview) -> None:
        """One message of a link; raises ProtocolError for one that coordinators do not get."""
        if not isinstance(message, StageMessage | StandingBy):
            raise ProtocolError(f"a coordinator gets no {type(message).__name__}")
        route = self._routes.get(message.session)
        if route is None:
            return  # a late word about a session that is over
        if link not in route.links:  # it left this stage, or has a standby there
            if route.standbys is not None and isinstance(message, StandingBy | SessionFailed):
                route.standbys.heard(link, message)
            return
        if isinstance(message, StandingBy):
            return  # one that has taken over meanwhile
        if route.n_waiting >= INBOX_MESSAGES_MAX:
            raise ProtocolError("a stage answers more than it was asked")
        route.inbox.send_nowait((link, message))

    def on_all_read(self, link: Link) -> None:
        """Nothing: each session wakes up by itself."""

    def on_suspected(self, link: Link) -> None:
        """Tells every session that uses the link, as long as there is room."""
        for route in self._routes.values():
            if link in route.links and route.n_waiting < INBOX_MESSAGES_MAX + N_SUSPICIONS_MAX:
                route.inbox.send_nowait((link, Suspected()))

    def on_closed(self, link: Link, error: ShardmeshError) -> None:
        """Tells every session that uses the link."""
        for route in self._routes.values():
            if link in route.links:
                # No bound is needed: a link ends once, and a session has one for each stage.
                route.inbox.send_nowait((link, error))
            if route.standbys is not None:
                route.standbys.lost(link)

    @asynccontextmanager
    async def session(
        self,
        chain: Chain,
        links: Sequence[Link],
        settings: SessionSettings,
        replacements: Replacements | None = None,
    ) -> AsyncIterator[Session]:
        """An open session; closed on all stages at the end, whatever the end is.

        `links` are those to the chain's stages, in order.  Without `replacements` the loss of a
        stage ends it.  Raises what a stage answered, or UnreachableError (the moment's) if one does
        not answer in time.
        """
        session_id = secrets.token_bytes(16)
        # Not bounded by itself: what may wait is counted before it is put in.
        inbox, events = trio.open_memory_channel[tuple[Link, Event]](float("inf"))
        own_links = list(links)
        stages = SessionStages(session_id, chain, own_links, events, settings, replacements)
        session = Session(stages, settings)
        self._routes[session_id] = _Route(inbox, own_links, session.standbys)
        try:
            await session.open()
            yield session
        finally:
            del self._routes[session_id]
            session.close()
