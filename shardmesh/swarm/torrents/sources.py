"""Who may have a file or a model: the listeners of the directory, and hints of the DHT."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Final

import trio

from shardmesh.errors import ProtocolError, ShardmeshError
from shardmesh.shards.publication import OpenPublication, open_publication
from shardmesh.swarm.dht import Dht
from shardmesh.swarm.directory import Directory, exchange
from shardmesh.swarm.host import Host
from shardmesh.swarm.torrents.exchange import (
    Ask,
    Source,
    ask_all,
    ask_for_file,
    ask_for_model,
)
from shardmesh.wire.torrent_file import TorrentFile

_log = logging.getLogger(__name__)

_ASKED_AT_ONCE_MAX: Final = 64
_DHT_INTERVAL_S: Final = 20.0
_DHT_INTERVAL_EMPTY_S: Final = 2.0
_LOOK_INTERVAL_S: Final = 2.0
_HINTS_KEPT: Final = 1000


def file_key(info_hash: bytes) -> str:
    """The DHT key of who has a file; the first 20 bytes of the info-hash, as it must be short."""
    return f"torrent/{info_hash.hex()[:40]}"


def model_key(manifest_digest: str) -> str:
    """The DHT key of who has a signed manifest."""
    return f"model/{manifest_digest[:40]}"


class Sources:
    """Finds nodes to ask, and asks them."""

    def __init__(self, host: Host, dht: Dht, directory: Directory) -> None:
        self._host = host
        self._dht = dht
        self._directory = directory
        self._hints: dict[str, tuple[float, list[str]]] = {}
        self._looked_s = -_LOOK_INTERVAL_S
        self._holders: dict[str, list[str]] = {}  # manifest digest -> who handed it over

    def _known(self, manifest_digest: str) -> list[str]:
        """Peer ids worth asking without a look-up: who has the model first, then all listeners."""
        listeners = [a for a in self._directory.all() if a.peer_id != self._host.peer_id]
        random.shuffle(listeners)
        for announcement in listeners:
            self.learn(announcement.peer_id)
        same = [a.peer_id for a in listeners if a.manifest_digest == manifest_digest]
        found = [*self._holders.get(manifest_digest, ()), *same, *(a.peer_id for a in listeners)]
        return list(dict.fromkeys(found))[:_ASKED_AT_ONCE_MAX]

    def learn(self, peer_id: str) -> None:
        """The host knows where a listener says that it is."""
        announcement = self._directory.get(peer_id)
        if announcement is not None:
            self._host.learn(peer_id, announcement.addresses)

    async def _ask_about(self, keys: tuple[str, ...], manifest_digest: str, ask: Ask) -> None:
        """Asks who is known, then who the DHT names; `ask` may do nothing once it has enough."""
        await self._look_around()
        known = self._known(manifest_digest)
        await ask_all(known, ask)
        hinted = [peer_id for key in keys for peer_id in await self._hinted(key)]
        await ask_all([p for p in dict.fromkeys(hinted) if p not in known], ask)

    async def _look_around(self) -> None:
        """Takes in what a neighbour knows; by itself a node asks only now and then."""
        connected = [p for p in self._host.connected() if p != self._host.peer_id]
        if not connected or trio.current_time() - self._looked_s < _LOOK_INTERVAL_S:
            return
        self._looked_s = trio.current_time()
        try:
            await exchange(self._host, self._directory, random.choice(connected), timeout_s=2)
        except ShardmeshError as error:
            _log.debug("a neighbour's directory could not be had: %s", error)

    def _note_holder(self, manifest_digest: str, peer_id: str) -> None:
        if len(self._holders) >= _HINTS_KEPT:
            self._holders.clear()
        holders = self._holders.setdefault(manifest_digest, [])
        if peer_id not in holders and len(holders) < _ASKED_AT_ONCE_MAX:
            holders.append(peer_id)

    async def _hinted(self, key: str) -> list[str]:
        """What the DHT says, asked now and then: an operation takes a tenth of a second of CPU."""
        asked_s, peer_ids = self._hints.get(key, (-_DHT_INTERVAL_S, []))
        interval_s = _DHT_INTERVAL_S if peer_ids else _DHT_INTERVAL_EMPTY_S
        if trio.current_time() - asked_s < interval_s:
            return peer_ids
        found: dict[str, list[str]] = {}
        try:
            found = await self._dht.find_providers(key)
        except ShardmeshError as error:
            _log.debug("[DHT] %s could not be looked up: %s", key, error)
        for peer_id, addresses in found.items():
            if addresses and self._directory.get(peer_id) is None:
                self._host.learn(peer_id, addresses)
        if not found and not self._host.connected():
            return []  # before it has joined a node finds nobody; asked again next time
        if len(self._hints) >= _HINTS_KEPT:
            self._hints.clear()
        self._hints[key] = (trio.current_time(), list(found))
        return list(found)

    async def find_file(
        self,
        info_hash: bytes,
        *,
        manifest_digest: str,
        wants_torrent: bool,
        port: int,
        on_source: Callable[[Source], None],
    ) -> None:
        """Hands over each node that has anything of a file, as soon as it answers.

        Who wants the torrent asks until one has handed it over.
        """
        found: list[TorrentFile] = []

        async def ask(peer_id: str) -> None:
            if found:
                return
            try:
                source = await ask_for_file(
                    self._host, peer_id, info_hash, wants_torrent=wants_torrent, port=port
                )
            except ProtocolError as error:
                _log.warning("[TORRENT] ✗ %s is not asked: %s", peer_id, error)
            except ShardmeshError as error:
                _log.debug("%s could not be asked for a file: %s", peer_id, error)
            else:
                if source.port:
                    on_source(source)
                if source.torrent is not None:
                    found.append(source.torrent)

        keys = (model_key(manifest_digest), file_key(info_hash))
        await self._ask_about(keys, manifest_digest, ask)

    async def find_publication(
        self, manifest_digest: str, publisher: bytes | None
    ) -> OpenPublication | None:
        """The signed manifest from whoever has it; what is not the publisher's is refused."""
        found: list[OpenPublication] = []

        async def ask(peer_id: str) -> None:
            if found:
                return
            try:
                signed = await ask_for_model(self._host, peer_id, manifest_digest)
                if signed is not None:
                    found.append(
                        open_publication(
                            signed, manifest_digest=manifest_digest, publisher=publisher
                        )
                    )
                    self._note_holder(manifest_digest, peer_id)
            except ProtocolError as error:
                _log.warning(
                    "[TORRENT] ✗ The manifest that %s hands over is refused: %s [%s]",
                    peer_id,
                    error,
                    error.code,
                )
            except ShardmeshError as error:
                _log.debug("%s could not be asked for a model: %s", peer_id, error)

        await self._ask_about((model_key(manifest_digest),), manifest_digest, ask)
        return found[0] if found else None
