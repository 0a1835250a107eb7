"""Published models: from a link to a manifest on the disk, and from a manifest to shards."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from shardmesh.coordinator.client import open_client
from shardmesh.errors import GgufError, InputError, ShardmeshError, UnreachableError
from shardmesh.listener.node_options import NodeOptions
from shardmesh.shards.library import Library
from shardmesh.shards.manifest import MANIFEST_NAME, Manifest, write_manifest
from shardmesh.shards.model_link import ModelLink
from shardmesh.shards.publication import OpenPublication, read_publication, write_publication
from shardmesh.shards.store import ShardStore
from shardmesh.swarm.torrents.service import FileService
from shardmesh.swarm.torrents.sources import Sources

logger = logging.getLogger("shardmesh")

RETRY_PAUSE_S = 5.0
"""At most so long between two rounds of asking for a manifest that nobody has."""

TELL_INTERVAL_S = 30.0
"""Between two lines that say so."""

FindPublication = Callable[[str, bytes | None], Awaitable[OpenPublication | None]]
"""Asks all nodes once for the signed manifest with a digest, by a publisher."""


async def provide_shard(
    store: ShardStore,
    manifest: Manifest,
    shard_id: int,
    files: FileService | None,
    link: ModelLink | None,
) -> None:
    """Returns when the shard's file is there, whole and right: from the disk or from other nodes.

    The tokenizer comes with it.  Raises InputError or GgufError (theirs), SHARD_NOT_FOUND among
    them if nobody has published the model, StorageError (ours).
    """
    wrong: GgufError | None = None
    try:
        if await trio.to_thread.run_sync(store.check, shard_id) is not None:
            return
    except GgufError as error:
        wrong = error
        logger.warning("[SHARD] ✗ %s; looking for it in the mesh", error)
    opened = None if files is None else await _publication(store, manifest, files, link)
    if files is None or opened is None:
        raise wrong or InputError(
            f"{store.shard_path(shard_id).name} is not in {store.directory}, and no node has "
            "published the model",
            code="SHARD_NOT_FOUND",
            next_step="run `shardmesh publish` on the machine that split the model, or copy the "
            "file from there",
        )
    await fetch_files(files, opened, store.directory, [shard_id])
    await trio.to_thread.run_sync(store.check, shard_id)


async def fetch_files(
    files: FileService, opened: OpenPublication, folder: Path, shard_ids: list[int]
) -> None:
    """Fetches shards, their adapters and the tokenizer at once; raises as `fetch_all`."""
    publication = opened.publication
    wanted = [publication.tokenizer()]
    for shard_id in shard_ids:
        wanted += publication.shard_files(shard_id)
    await files.fetch_all(opened, wanted, folder)


async def _publication(
    store: ShardStore, manifest: Manifest, files: FileService, link: ModelLink | None
) -> OpenPublication | None:
    """The signed manifest, which is kept beside the manifest; None if nobody has it now."""
    digest = manifest.digest()
    publisher = link.publisher if link is not None and link.manifest_digest == digest else None
    opened = await files.find_publication(digest, publisher)
    if opened is not None:
        await trio.to_thread.run_sync(keep_publication, store.directory, opened)
    return opened


def keep_publication(folder: Path, opened: OpenPublication) -> None:
    """Puts manifest and signature into a model's folder, unless they are there."""
    store = ShardStore(folder)
    if store.by_digest(opened.manifest.digest()) is None:
        manifest = store.manifest()
        if manifest is not None:
            raise InputError(
                f"{folder} holds the model {manifest.model_name}, not {opened.manifest.model_name}",
                code="CONTRADICTION",
                next_step="give another folder with --shards-dir",
            )
        write_manifest(opened.manifest, folder / MANIFEST_NAME)
    write_publication(folder, opened.signed)


def publication_of(library: Library, link: ModelLink) -> OpenPublication | None:
    """The link's model, if this disk has its manifest, signed by the link's publisher."""
    store = library.by_digest(link.manifest_digest)
    manifest = store.manifest() if store is not None else None
    if store is None or manifest is None:
        return None
    try:
        opened = read_publication(store.directory, manifest)
    except ShardmeshError as error:
        logger.warning("[TORRENT] ✗ %s: %s", store.directory, error)
        return None
    return opened if opened is not None and opened.publisher == link.publisher else None


async def with_manifest(options: NodeOptions, link: ModelLink) -> NodeOptions:
    """Options whose `shards_dir` is the folder of the link's model, with its manifest in it.

    Asks the mesh for it as long as nobody has it.  Raises ProtocolError (theirs) never: a manifest
    that is refused is not taken, and the next node is asked.
    """
    own_dir = None if options.fetch_into_shards_dir else options.models_dir
    library = Library(options.shards_dir, own_dir)
    folder = await trio.to_thread.run_sync(
        library.folder_for, link.model_name, link.manifest_digest
    )
    if await trio.to_thread.run_sync(publication_of, library, link) is None:
        logger.info("[TORRENT] Asking the mesh for the signed manifest of %s", link.model_name)
        opened = await _ask_mesh(options, link)
        await trio.to_thread.run_sync(keep_publication, folder, opened)
        logger.info("[TORRENT] ✓ Signed manifest of %s is here", opened.manifest.model_name)
    return dataclasses.replace(options, shards_dir=folder)


async def _ask_mesh(options: NodeOptions, link: ModelLink) -> OpenPublication:
    while True:
        try:
            async with open_client(
                bootstraps=options.bootstraps,
                cluster=options.cluster,
                admission=options.admission,
                shards_dir=options.shards_dir,
                cache_dir=options.cache_dir,
            ) as client:
                sources = Sources(client.host, client.dht, client.directory)
                return await wait_for_publication(sources.find_publication, link)
        except UnreachableError as error:
            logger.warning("[CONNECT] ✗ %s; trying again", error)
            await trio.sleep(RETRY_PAUSE_S)


async def wait_for_publication(find: FindPublication, link: ModelLink) -> OpenPublication:
    """The link's signed manifest as soon as some node hands it over; asks for ever."""
    pause_s, told_s = 0.5, trio.current_time() - TELL_INTERVAL_S + 2
    while True:
        opened = await find(link.manifest_digest, link.publisher)
        if opened is not None:
            return opened
        if trio.current_time() - told_s >= TELL_INTERVAL_S:
            told_s = trio.current_time()
            logger.warning(
                "[TORRENT] No node has the manifest of %s yet; looking on", link.model_name
            )
        await trio.sleep(pause_s)
        pause_s = min(pause_s * 1.5, RETRY_PAUSE_S)
