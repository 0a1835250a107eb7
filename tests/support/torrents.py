"""Nodes that give and fetch model files in one process: real hosts and sessions, a table as DHT."""

from __future__ import annotations

import dataclasses
import hashlib
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import libtorrent as lt
import trio

from shardmesh.shards.hashing import hash_file
from shardmesh.shards.library import Library
from shardmesh.shards.manifest import (
    SCHEMA_VERSION,
    Manifest,
    ShardEntry,
    TokenizerEntry,
    write_manifest,
)
from shardmesh.shards.publication import (
    OpenPublication,
    Publication,
    open_publication,
    sign_publication,
    write_publication,
)
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.torrents.options import TorrentOptions
from shardmesh.swarm.torrents.service import FileService, open_files
from shardmesh.swarm.torrents.settings import session_settings
from shardmesh.wire.cluster_secret import ClusterSecret
from shardmesh.wire.torrent_file import TorrentFile

MB = 1_000_000
DEADLINE_S = 60.0


class TableDht:
    """What the DHT is for here: who said that it has what."""

    def __init__(self, table: dict[str, dict[str, list[str]]], host: Host) -> None:
        self._table = table
        self._host = host

    async def provide(self, key: str) -> None:
        self._table.setdefault(key, {})[self._host.peer_id] = self._host.addresses()
        await trio.lowlevel.checkpoint()

    async def find_providers(self, key: str) -> dict[str, list[str]]:
        await trio.lowlevel.checkpoint()
        found = self._table.get(key, {})
        return {p: a for p, a in found.items() if p != self._host.peer_id}


@dataclasses.dataclass
class FileNode:
    """One node and its folder."""

    host: Host
    files: FileService
    folder: Path

    @property
    def n_bytes_given(self) -> int:
        """Bytes of files that it has sent, at this very moment."""
        handles = [t._handle for t in self.files._torrents.all() if t._handle is not None]
        return sum(int(handle.status().total_payload_upload) for handle in handles)


class FileMesh:
    """Nodes that find each other; made with a folder for all of them."""

    def __init__(
        self,
        folder: Path,
        secret: ClusterSecret | None = None,
        hosts: tuple[str, ...] = ("127.0.0.1",),
    ) -> None:
        """Files are given on all `hosts`, the nodes themselves are on the last one."""
        self.folder = folder
        self.hosts = hosts
        self.secret = secret
        self.table: dict[str, dict[str, list[str]]] = {}

    @asynccontextmanager
    async def node(
        self, name: str, *, gives: bool = True, **options: int
    ) -> AsyncIterator[FileNode]:
        """A node whose models lie in `folder/name`."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        async with open_host(
            new_identity(), listen_host=self.hosts[-1], admission=Admission(self.secret)
        ) as host:
            dht = TableDht(self.table, host)
            async with open_files(
                host,
                dht,  # type: ignore[arg-type]
                Directory("test"),
                Library(folder),
                TorrentOptions(listen_hosts=self.hosts, **options),
            ) as files:
                if gives:
                    files.start()
                    await files.wait_given()
                yield FileNode(host, files, folder)


def make_model(
    folder: Path, *sizes: int, name: str = "random", seed: int = 0, n_bytes_tokenizer: int = 10_000
) -> OpenPublication:
    """A published model of random bytes, all its files in the folder; not one that computes."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    entries, hashes = [], []
    for shard_id, n_bytes in enumerate(sizes):
        path = folder / f"shard-{shard_id}.gguf"
        path.write_bytes(generator.randbytes(n_bytes))
        hashed = hash_file(path)
        entries.append(
            ShardEntry(
                shard_id=shard_id,
                layer_start=shard_id,
                layer_end=shard_id + 1,
                n_bytes=n_bytes,
                sha256=hashed.sha256,
            )
        )
        hashes.append(hashed.torrent.info_hash())
    path = folder / "tokenizer.gguf"
    path.write_bytes(generator.randbytes(n_bytes_tokenizer))
    hashed = hash_file(path)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        model_name=name,
        architecture="llama",
        n_layer=len(sizes),
        n_embd=64,
        n_ctx_train=512,
        quantization="Q8_0",
        slicer_version="0.1.0",
        piece_tokens=32,
        can_roll_back=True,
        adapters=(),
        shards=tuple(entries),
        tokenizer=TokenizerEntry(n_bytes=n_bytes_tokenizer, sha256=hashed.sha256),
    )
    publication = Publication(
        manifest=manifest,
        shard_info_hashes=tuple(hashes),
        tokenizer_info_hash=hashed.torrent.info_hash(),
        adapter_info_hashes=(),
    )
    signed = sign_publication(publication, new_identity())
    write_manifest(manifest, folder / "manifest.json")
    write_publication(folder, signed)
    return open_publication(signed, manifest_digest=manifest.digest())


async def wait_until(condition: Callable[[], bool], what: str) -> None:
    end_s = trio.current_time() + DEADLINE_S
    while not condition():
        assert trio.current_time() < end_s, f"never: {what}"
        await trio.sleep(0.02)


async def fetch(node: FileNode, model: OpenPublication, shard_id: int = 0) -> Path:
    """The file of a shard, fetched by a node."""
    file = model.publication.shard(shard_id)
    with trio.fail_after(DEADLINE_S):
        await node.files.fetch(model, file, node.folder)
    return node.folder / file.name


def is_right(path: Path, model: OpenPublication, shard_id: int = 0) -> bool:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return digest == model.manifest.shards[shard_id].sha256


def leftovers(folder: Path) -> list[str]:
    """What lies in a folder that is neither a model's file nor a memory of it."""
    kept = (".checked.json", ".torrents", "manifest.json", "publication.cbor")
    names = sorted(path.name for path in folder.iterdir())
    return [name for name in names if name not in kept and not name.endswith(".gguf")]


class Stranger:
    """A BitTorrent end outside of the mesh that has found a port and knows a file's torrent."""

    def __init__(self, torrent: TorrentFile, folder: Path, host: str) -> None:
        """Comes from `host`, another address of loopback.  Raises OSError where there is none."""
        with socket.socket() as probe:
            probe.bind((host, 0))
        folder.mkdir()
        settings = session_settings(host, 0, upload_rate_bytes_per_s=0, download_rate_bytes_per_s=0)
        own = {"outgoing_interfaces": host, "alert_mask": lt.alert_category.connect}
        self._session = lt.session({**settings, **own})
        params = lt.load_torrent_buffer(torrent.encode())
        params.save_path = str(folder)
        params.flags = lt.torrent_flags.update_subscribe
        self._handle = self._session.add_torrent(params)

    def dial(self, port: int) -> None:
        self._handle.connect_peer(("127.0.0.1", port))

    @property
    def n_bytes(self) -> int:
        """What it has got."""
        return int(self._handle.status().total_payload_download)

    @property
    def n_failed(self) -> int:
        """How often a connection was refused or broken off."""
        alerts = self._session.pop_alerts()
        return sum(isinstance(alert, lt.peer_disconnected_alert) for alert in alerts)


class _BitTorrentEnd:
    """libtorrent itself, with a file in a folder; some settings are not those of a node."""

    def __init__(self, torrent: TorrentFile, folder: Path, **settings: object) -> None:
        usual = session_settings(
            ["127.0.0.1"], 0, upload_rate_bytes_per_s=0, download_rate_bytes_per_s=0
        )
        self._session = lt.session({**usual, **settings})
        params = lt.load_torrent_buffer(torrent.encode())
        params.save_path = str(folder)
        params.flags = lt.torrent_flags.seed_mode | lt.torrent_flags.upload_mode
        self._handle = self._session.add_torrent(params)
        self.port: int = self._session.listen_port()


class Poisoner(_BitTorrentEnd):
    """A BitTorrent end that says it has a file and sends something else."""

    def __init__(self, torrent: TorrentFile, folder: Path) -> None:
        folder.mkdir()
        (folder / torrent.name).write_bytes(b"\x66" * torrent.n_bytes)
        super().__init__(torrent, folder, disable_hash_checks=True)

    @property
    def n_bytes_sent(self) -> int:
        return int(self._handle.status().total_payload_upload)


class Miser(_BitTorrentEnd):
    """A BitTorrent end that has a file and never sends a piece of it."""

    def __init__(self, torrent: TorrentFile, folder: Path) -> None:
        super().__init__(torrent, folder, unchoke_slots_limit=0)

    @property
    def n_connections(self) -> int:
        return int(self._handle.status().num_peers)
