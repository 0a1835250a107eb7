"""A member of the mesh that gives and fetches model files and serves no shard."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

from shardmesh.errors import InputError, ShardmeshError, ungrouped
from shardmesh.shards.checked import hashes_of
from shardmesh.shards.library import Library
from shardmesh.shards.manifest import MANIFEST_NAME, Manifest, check_model_name, write_manifest
from shardmesh.shards.model_link import ModelLink
from shardmesh.shards.names import adapter_name
from shardmesh.shards.publication import (
    OpenPublication,
    Publication,
    open_publication,
    sign_publication,
    write_publication,
)
from shardmesh.shards.store import ShardStore
from shardmesh.swarm.addresses import with_peer_id
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.commands import get_capabilities
from shardmesh.swarm.dht import open_dht
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import Identity, load_identity, new_identity
from shardmesh.swarm.membership import Membership
from shardmesh.swarm.state_file import locked_folder
from shardmesh.swarm.torrents.options import TorrentOptions
from shardmesh.swarm.torrents.service import FileService, open_files
from shardmesh.wire.envelope import Signer
from shardmesh.wire.limits import COMMAND_TIMEOUT_S, MODEL_LINK_BOOTSTRAPS_MAX

logger = logging.getLogger("shardmesh")

PUBLISHER_KEY_NAME = "publisher.key"
SEEDER_NAME = "seeder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeederOptions:
    """Where a seeder belongs, and what it has."""

    bootstraps: tuple[str, ...]
    cluster: str
    admission: Admission
    listen_hosts: tuple[str, ...]
    port: int
    state_dir: Path
    shards_dir: Path
    models_dir: Path | None
    torrents: TorrentOptions


@dataclasses.dataclass(frozen=True)
class Seeder:
    """A running seeder; made by `open_seeder`."""

    host: Host
    files: FileService
    membership: Membership


@asynccontextmanager
async def open_seeder(options: SeederOptions) -> AsyncIterator[Seeder]:
    """A seeder that gives its files and joins the mesh, whenever that can be reached.

    Raises InputError (theirs, PORT_TAKEN).  All of it is gone when the block is left.
    """
    library = Library(options.shards_dir, options.models_dir)
    with contextlib.ExitStack() as stack, ungrouped():
        identity = _identity(options.state_dir / SEEDER_NAME, stack)
        directory = Directory(options.cluster)
        async with (
            open_host(
                identity,
                listen_host=options.listen_hosts,
                port=options.port,
                agent=f"seeder/{options.cluster}",
                admission=options.admission,
            ) as host,
            open_dht(host, cluster=options.cluster, server=False) as dht,
            open_files(host, dht, directory, library, options.torrents) as files,
        ):
            membership = Membership(
                host,
                dht,
                directory,
                bootstraps=options.bootstraps,
                signer=identity,
                logger=logger.getChild("seeder"),
            )
            membership.updates.on_removed(files.cut_off)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(membership.run)
                files.start()
                try:
                    yield Seeder(host, files, membership)
                finally:
                    nursery.cancel_scope.cancel()


def _identity(folder: Path, stack: contextlib.ExitStack) -> Identity:
    """The kept one, so that hints in the DHT stay right; a fresh one if another seeder has it."""
    try:
        stack.enter_context(locked_folder(folder))
    except InputError:
        return new_identity()
    return load_identity(folder / "node.key")


# -- publishing ------------------------------------------------------------------------------------


def load_publisher(state_dir: Path) -> Identity:
    """The publisher's key of this user, made on first use; raises as `load_identity`."""
    return load_identity(state_dir / PUBLISHER_KEY_NAME)


def publish_model(
    folder: Path,
    signer: Signer,
    *,
    name: str | None = None,
    on_file: Callable[[str], None] = lambda name: None,
) -> OpenPublication:
    """Signs the manifest of a split with the info-hashes of its files, which are all read.

    Another `name` is written into the manifest, which makes it another model to the mesh.
    `on_file` is told each file before it is read.  Raises InputError or GgufError (theirs) if a
    file is missing or wrong, StorageError (ours).
    """
    store = ShardStore(folder, create=False)
    manifest = store.manifest()
    if manifest is None:
        raise InputError(
            f"{folder} has no {MANIFEST_NAME}",
            code="NO_MANIFEST",
            next_step="split a model with `shardmesh split`, and give the folder it wrote to",
        )
    publication = _hashed(store, manifest, on_file)
    if name is not None and name != manifest.model_name:
        manifest = msgspec.structs.replace(manifest, model_name=check_model_name(name))
        write_manifest(manifest, folder / MANIFEST_NAME)
        publication = msgspec.structs.replace(publication, manifest=manifest)
    signed = sign_publication(publication, signer)
    write_publication(folder, signed)
    return open_publication(signed, manifest_digest=manifest.digest())


def _hashed(store: ShardStore, manifest: Manifest, on_file: Callable[[str], None]) -> Publication:
    """A model's publication, after each file was read and held against the manifest."""

    def info_hash_of(path: Path) -> bytes:
        on_file(path.name)
        if not path.exists():
            raise _incomplete(path)
        return hashes_of(path).torrent.info_hash()  # and its SHA-256, for the check that follows

    shard_hashes = []
    for shard in manifest.shards:
        shard_hashes.append(info_hash_of(store.shard_path(shard.shard_id)))
        store.check(shard.shard_id)
    adapter_hashes = [
        tuple(
            None if file is None else info_hash_of(store.directory / adapter_name(number, shard_id))
            for shard_id, file in enumerate(adapter.files)
        )
        for number, adapter in enumerate(manifest.adapters)
    ]
    tokenizer_info_hash = info_hash_of(store.tokenizer_path())
    store.check_tokenizer()
    return Publication(
        manifest=manifest,
        shard_info_hashes=tuple(shard_hashes),
        tokenizer_info_hash=tokenizer_info_hash,
        adapter_info_hashes=tuple(adapter_hashes),
    )


def _incomplete(path: Path) -> InputError:
    return InputError(
        f"{path} is missing, and a model is published whole",
        code="SHARD_NOT_FOUND",
        next_step="publish on the machine that split the model",
    )


async def bootstraps_for_others(host: Host, bootstraps: tuple[str, ...]) -> tuple[str, ...]:
    """The bootstraps as other machines reach them, with their peer ids as far as known.

    A loopback address is replaced by those that the bootstrap itself names.
    """
    found: list[str] = []
    for address in bootstraps:
        try:
            peer_id = await host.connect([address], COMMAND_TIMEOUT_S)
            own = (await get_capabilities(host, peer_id)).addresses
        except ShardmeshError as error:
            logger.warning("[CONNECT] ✗ %s is in the link, but not reachable: %s", address, error)
            found.append(address)
            continue
        others = [text for text in own if not _is_loopback(text)]
        if _is_loopback(address) and others:
            found += others[:2]
        else:
            found.append(with_peer_id(address, peer_id))
    return tuple(dict.fromkeys(found))[:MODEL_LINK_BOOTSTRAPS_MAX]


def _is_loopback(address: str) -> bool:
    parts = address.split("/")
    try:
        return ipaddress.ip_address(parts[2]).is_loopback
    except (ValueError, IndexError):
        return parts[2:3] == ["localhost"]


def link_to(opened: OpenPublication, bootstraps: tuple[str, ...]) -> ModelLink:
    """The model link of a publication."""
    return ModelLink(
        model_name=opened.manifest.model_name,
        manifest_digest=opened.manifest.digest(),
        publisher=opened.publisher,
        bootstraps=bootstraps,
    )
