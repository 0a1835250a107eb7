"""What the console shows, tied together: watch, sessions, feed and lasting events."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import trio

from shardmesh.coordinator.repairs import Repair
from shardmesh.errors import StorageError
from shardmesh.web.event_store import EventStore
from shardmesh.web.events import EventHub
from shardmesh.web.feed import Feed
from shardmesh.web.sessions import LiveSession, SessionBoard, repair_json
from shardmesh.web.state import Json, state_document
from shardmesh.web.watch import MeshWatch

logger = logging.getLogger("shardmesh")


class Console:
    """The sources of the page, tied to its feed; `run` keeps it going."""

    def __init__(
        self,
        watch: MeshWatch,
        sessions: SessionBoard,
        hub: EventHub,
        store: EventStore,
        *,
        about: Mapping[str, object],
        links: Mapping[str, str],  # of published models, by manifest digest
    ) -> None:
        self.store = store
        self.feed = Feed(self._document)
        self._watch = watch
        self._sessions = sessions
        self._hub = hub
        self._links = links
        self.about: Json = {key: value for key, value in about.items() if value is not None}
        watch.tell(self.feed.touch)
        sessions.tell(self._sessions_changed)
        sessions.tell_repairs(self._stage_replaced)

    async def run(self) -> None:
        """Watches, tells and keeps until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_events)
            nursery.start_soon(self._watch.run)
            nursery.start_soon(self.feed.run)

    def _document(self) -> Json:
        return state_document(
            self._watch.nodes,
            gateway=dict(self.about),
            sessions=self._sessions.document(),
            links=self._links,
        )

    def _sessions_changed(self, *, is_new_work: bool) -> None:
        if is_new_work:  # nodes become busy or idle
            self._watch.touch()
        self.feed.touch()

    def _stage_replaced(self, session: LiveSession, repair: Repair) -> None:
        data = {"model_name": session.chain.stages[0].model_name, **repair_json(repair)}
        self._hub.publish("session.recovered", data=data)

    async def _keep_events(self) -> None:
        """Stores the hub's lasting events and tells the pages, in this order."""
        with self._hub.subscribe() as events:
            self._hub.publish("gateway.started")
            async for event in events:
                if not event.is_lasting:
                    continue
                try:
                    self.feed.tell_events(await self.store.add([event]))
                except StorageError as error:
                    logger.warning("[WEB] %s", error)
