"""Links of the models in the mesh, for those that somebody has published."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from typing import Final

import trio

from shardmesh.errors import ShardmeshError
from shardmesh.listener.seeder import link_to
from shardmesh.shards.publication import open_publication
from shardmesh.swarm.host import Host
from shardmesh.swarm.torrents.exchange import ask_for_model
from shardmesh.wire.announcement import Announcement

logger = logging.getLogger(__name__)

LOOK_INTERVAL_S: Final = 2.0
ASK_INTERVAL_S: Final = 30.0
"""A model may be published after it was served."""

NODES_ASKED_MAX: Final = 3
"""Of those that serve the model; whoever has fetched it has the publisher's signature."""


class ModelLinks:
    """The links found so far by manifest digest, in `links`; kept up by `run`."""

    def __init__(
        self,
        host: Host,
        *,
        listed: Callable[[], Iterable[Announcement]],
        is_seen: Callable[[], bool],
        on_change: Callable[[], None],
    ) -> None:
        self.links: dict[str, str] = {}
        self.bootstraps: tuple[str, ...] = ()  # that go into the links; nothing is asked before
        self._host = host
        self._listed = listed
        self._is_seen = is_seen
        self._on_change = on_change
        self._asked_s: dict[str, float] = {}

    async def run(self) -> None:
        """Asks about each model while somebody looks on, until cancelled."""
        while True:
            await trio.sleep(LOOK_INTERVAL_S)
            if self._is_seen() and self.bootstraps:
                await self.look()

    async def look(self) -> None:
        """Asks about the models whose turn it is; forgets those that nobody serves any more."""
        serving: dict[str, list[str]] = {}
        for a in self._listed():
            if a.capabilities.shard_loaded:
                serving.setdefault(a.manifest_digest, []).append(a.peer_id)
        for known in (self.links, self._asked_s):
            for digest in known.keys() - serving.keys():
                del known[digest]
        now_s = trio.current_time()
        for digest, peer_ids in serving.items():
            asked_s = self._asked_s.get(digest, -ASK_INTERVAL_S)
            if digest not in self.links and now_s - asked_s >= ASK_INTERVAL_S:
                self._asked_s[digest] = now_s
                await self._ask(digest, peer_ids)

    async def _ask(self, digest: str, peer_ids: list[str]) -> None:
        for peer_id in random.sample(peer_ids, min(NODES_ASKED_MAX, len(peer_ids))):
            try:
                signed = await ask_for_model(self._host, peer_id, digest)
                if signed is None:
                    continue
                # The digest says what the files are, so it does not matter who signed.
                opened = open_publication(signed, manifest_digest=digest)
            except ShardmeshError as error:
                logger.debug("%s gave no link of its model: %s", peer_id, error)
                continue
            self.links[digest] = str(link_to(opened, self.bootstraps))
            self._on_change()
            return
