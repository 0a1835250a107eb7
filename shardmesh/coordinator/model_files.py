"""The tokenizer of the model that the mesh serves: from disk, or from a node that has it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Protocol
from weakref import WeakValueDictionary

import trio

from shardmesh.coordinator.chain import Replica
from shardmesh.engine.chat import ChatTemplate
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import (
    InputError,
    MomentError,
    ProtocolError,
    ShardmeshError,
    StorageError,
    TheirError,
    UnreachableError,
)
from shardmesh.shards.atomic import atomic_file
from shardmesh.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_manifest,
    encode_manifest,
    write_manifest,
)
from shardmesh.shards.store import ShardStore
from shardmesh.swarm.host import Host
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.wire.codec import decode_cbor, decode_json, encode_cbor
from shardmesh.wire.limits import REQUEST_READ_TIMEOUT_S, WRITE_TIMEOUT_S
from shardmesh.wire.model_info import (
    MODEL_INFO_BYTES_MAX,
    MODEL_INFO_PROTOCOL,
    MODEL_INFO_REQUEST_BYTES_MAX,
    ModelInfo,
    ModelInfoRequest,
)
from shardmesh.wire.patience import write_timeout_s

logger = logging.getLogger(__name__)

_DIGEST: Final = re.compile("[0-9a-f]{64}")

FETCH_TIMEOUT_S: Final = write_timeout_s(MODEL_INFO_BYTES_MAX)
"""As long as the other side may take to send the largest tokenizer: over a slow line, minutes."""

FETCH_SILENCE_TIMEOUT_S: Final = WRITE_TIMEOUT_S
"""Nothing more came for so long: another node is asked."""

N_SOURCES_MAX = 3
"""Nodes that are asked, one after the other."""


@dataclasses.dataclass
class OpenModel:
    """A model's tokenizer, ready for use, and its chat template, if it has one."""

    manifest: Manifest
    tokenizer: Tokenizer
    vocabulary_path: Path  # the file that the tokenizer is from
    n_users: int = 0
    _chat: ChatTemplate | None = None

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Messages as tokens; slow the first time.  Raises InputError (theirs).

        `variables` such as `tools` go to the template.
        """
        return self._template().encode(messages, **variables)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Messages as the text that the model is given.  Raises InputError (theirs)."""
        return self._template().render(messages, **variables)

    def _template(self) -> ChatTemplate:
        if self._chat is None:
            self._chat = ChatTemplate(self.tokenizer)
        return self._chat

    def close(self) -> None:
        """Frees the tokenizer and ends the template's process."""
        if self._chat is not None:
            self._chat.close()
        self.tokenizer.close()


class LocalModels(Protocol):
    """Where models lie on this disk: one folder, or a library of several."""

    def by_digest(self, digest: str) -> ShardStore | None: ...


class ModelFiles:
    """Opens models by manifest digest; keeps the last one open, and each that is in use."""

    def __init__(self, host: Host, models: LocalModels, cache_dir: Path) -> None:
        self._host = host
        self._models = models
        self._cache_dir = cache_dir
        self._open: dict[str, OpenModel] = {}
        self._opening = WeakValueDictionary[str, trio.Lock]()  # one that hangs holds up no other
        self._last: str | None = None

    @property
    def n_open(self) -> int:
        return len(self._open)

    @asynccontextmanager
    async def use(self, replicas: Sequence[Replica]) -> AsyncIterator[OpenModel]:
        """The model that these replicas serve, open until the block is left.

        Raises UnreachableError (the moment's) if neither disk nor a node has its tokenizer.
        """
        model = await self._opened(replicas)
        model.n_users += 1
        try:
            yield model
        finally:
            model.n_users -= 1
            self._close_unused()

    async def _opened(self, replicas: Sequence[Replica]) -> OpenModel:
        digest = replicas[0].manifest_digest
        if not _DIGEST.fullmatch(digest):  # it names a folder of the cache
            raise ProtocolError("a manifest digest is not a SHA-256 in hex", code="BAD_MANIFEST")
        if digest not in self._open:  # in a crowd each turn of the loop takes milliseconds
            async with self._opening.setdefault(digest, trio.Lock()):
                if digest not in self._open:
                    store = await trio.to_thread.run_sync(self._local_store, digest)
                    if store is None:
                        store = await self._fetch(digest, replicas)
                    self._open[digest] = await trio.to_thread.run_sync(_open_model, store)
        self._last = digest
        return self._open[digest]

    def close(self) -> None:
        """Frees what is open; a model that is in use as soon as it no longer is."""
        self._last = None
        self._close_unused()

    def _close_unused(self) -> None:
        for digest, model in list(self._open.items()):
            if model.n_users == 0 and digest != self._last:
                del self._open[digest]
                model.close()

    def _local_store(self, digest: str) -> ShardStore | None:
        for models in (self._models, ShardStore(self._cache_dir / digest, create=False)):
            try:
                store = models.by_digest(digest)
                if store is not None and store.check_tokenizer():
                    return store
            except (InputError, StorageError) as error:
                logger.warning("a tokenizer on this disk is not used: %s", error)
        return None

    async def _fetch(self, digest: str, replicas: Sequence[Replica]) -> ShardStore:
        last_error: ShardmeshError | None = None
        for replica in replicas[:N_SOURCES_MAX]:
            try:
                info = await self._ask(replica, digest)
                return await trio.to_thread.run_sync(self._keep, digest, info)
            except (TheirError, MomentError) as error:
                last_error = error
        raise UnreachableError(
            "no node hands over the tokenizer of the model",
            code="NO_TOKENIZER",
            next_step="copy tokenizer.gguf and manifest.json of the split into --shards-dir",
        ) from last_error

    async def _ask(self, replica: Replica, digest: str) -> ModelInfo:
        self._host.learn(replica.peer_id, replica.addresses)
        answer = await self._host.request(
            replica.peer_id,
            MODEL_INFO_PROTOCOL,
            encode_cbor(ModelInfoRequest(manifest_digest=digest)),
            timeout_s=FETCH_TIMEOUT_S,
            silence_timeout_s=FETCH_SILENCE_TIMEOUT_S,
            response_bytes_max=MODEL_INFO_BYTES_MAX,
        )
        return await trio.to_thread.run_sync(decode_cbor, answer, ModelInfo)

    def _keep(self, digest: str, info: ModelInfo) -> ShardStore:
        """Checks what was handed over and writes it, the tokenizer first."""
        if info.manifest is None or info.tokenizer is None:
            raise UnreachableError("the node has no tokenizer")
        manifest = check_manifest(decode_json(info.manifest, Manifest))
        if manifest.digest() != digest:
            raise ProtocolError("another manifest than asked for", code="BAD_MANIFEST")
        if hashlib.sha256(info.tokenizer).hexdigest() != manifest.tokenizer.sha256:
            raise ProtocolError("the tokenizer is not the manifest's", code="BAD_TOKENIZER")
        store = ShardStore(self._cache_dir / digest)
        try:
            with atomic_file(store.tokenizer_path()) as file:
                file.write(info.tokenizer)
        except OSError as error:
            raise StorageError(f"the tokenizer cannot be kept: {error.strerror}") from error
        write_manifest(manifest, store.directory / MANIFEST_NAME)
        return store


def serve_model_info(host: Host, models: LocalModels) -> None:
    """Hands over this node's manifests and tokenizers to whoever asks for them by digest."""

    async def serve(stream: ByteStream, peer_id: str) -> None:
        with trio.fail_after(REQUEST_READ_TIMEOUT_S):
            request = decode_cbor(
                await receive_message(stream, MODEL_INFO_REQUEST_BYTES_MAX), ModelInfoRequest
            )
        info = await trio.to_thread.run_sync(_read_info, models, request.manifest_digest)
        payload = await trio.to_thread.run_sync(encode_cbor, info)
        await send_message(stream, payload)  # the stream gives up who takes too long

    host.serve(MODEL_INFO_PROTOCOL, serve)


def _read_info(models: LocalModels, digest: str) -> ModelInfo:
    store = models.by_digest(digest)
    manifest = store.manifest() if store is not None else None
    if store is None or manifest is None or store.check_tokenizer() is None:
        return ModelInfo(manifest=None, tokenizer=None)
    return ModelInfo(
        manifest=encode_manifest(manifest), tokenizer=store.tokenizer_path().read_bytes()
    )


def _open_model(store: ShardStore) -> OpenModel:
    manifest = store.manifest()
    if manifest is None:
        raise InputError(f"{store.directory} has no {MANIFEST_NAME}")
    path = store.tokenizer_path()
    return OpenModel(manifest, Tokenizer.open(path), path)
