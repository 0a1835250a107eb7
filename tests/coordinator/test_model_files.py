"""A model's tokenizer from disk or from a node: only the one that the digest names."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from support.models import BUILT_IN, write_model
from support.replicas import replica

from shardmesh.coordinator.chain import Replica
from shardmesh.coordinator.model_files import N_SOURCES_MAX, ModelFiles, serve_model_info
from shardmesh.errors import BusyError, ProtocolError, ShardmeshError, UnreachableError
from shardmesh.shards.layers import ranges_of_counts
from shardmesh.shards.manifest import Manifest, encode_manifest
from shardmesh.shards.split import split_model
from shardmesh.shards.store import ShardStore
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.limits import MANIFEST_BYTES_MAX
from shardmesh.wire.model_info import MODEL_INFO_PROTOCOL, ModelInfo, ModelInfoRequest


class FakeHost:
    """A host whose other nodes answer as told; it remembers who was asked and what is served."""

    def __init__(self, answers: dict[str, ModelInfo | bytes | ShardmeshError]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.served: dict[str, Any] = {}

    def learn(self, peer_id: str, addresses: Sequence[str]) -> None:
        assert addresses

    async def request(self, peer_id: str, protocol: str, payload: bytes, **limits: Any) -> bytes:
        assert protocol == MODEL_INFO_PROTOCOL
        assert len(decode_cbor(payload, ModelInfoRequest).manifest_digest) == 64
        self.asked.append(peer_id)
        await trio.lowlevel.checkpoint()
        answer = self.answers[peer_id]
        if isinstance(answer, ShardmeshError):
            raise answer
        return answer if isinstance(answer, bytes) else encode_cbor(answer)

    def serve(self, protocol: str, handler: Any) -> None:
        self.served[protocol] = handler


@pytest.fixture(scope="module")
def split_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("split")
    model = write_model(directory / "model.gguf", n_layer=2, vocabulary=BUILT_IN)
    split_model(model, ranges_of_counts([1, 1]), directory, name="tiny")
    return directory


@pytest.fixture
def info(split_dir: Path) -> ModelInfo:
    """What an honest node hands over."""
    return ModelInfo(
        manifest=(split_dir / "manifest.json").read_bytes(),
        tokenizer=(split_dir / "tokenizer.gguf").read_bytes(),
    )


def manifest_of(split_dir: Path) -> Manifest:
    manifest = ShardStore(split_dir, create=False).manifest()
    assert manifest is not None
    return manifest


def replicas(digest: str, *peer_ids: str) -> list[Replica]:
    return [replica(peer_id, manifest_digest=digest) for peer_id in peer_ids]


def new_files(host: FakeHost, tmp_path: Path, shards_dir: Path | None = None) -> ModelFiles:
    store = ShardStore(shards_dir or tmp_path / "none", create=False)
    return ModelFiles(host, store, tmp_path / "cache")  # type: ignore[arg-type]


async def works(files: ModelFiles, digest: str, *peer_ids: str) -> bool:
    async with files.use(replicas(digest, *peer_ids)) as model:
        tokens = model.tokenizer.encode("once")
        return b"".join(map(model.tokenizer.piece, tokens)).strip() == b"once"


async def test_what_is_on_disk_is_used(split_dir: Path, tmp_path: Path) -> None:
    host = FakeHost({})
    files = new_files(host, tmp_path, split_dir)
    assert await works(files, manifest_of(split_dir).digest(), "a")
    assert host.asked == []
    files.close()


async def test_what_a_node_hands_over_is_kept(
    split_dir: Path, tmp_path: Path, info: ModelInfo
) -> None:
    digest = manifest_of(split_dir).digest()
    host = FakeHost({"a": info})
    for _ in range(2):
        files = new_files(host, tmp_path)
        assert await works(files, digest, "a")
        assert await works(files, digest, "a")
        files.close()
    assert host.asked == ["a"]


async def test_a_tampered_copy_on_disk_is_fetched_anew(
    split_dir: Path, tmp_path: Path, info: ModelInfo
) -> None:
    digest = manifest_of(split_dir).digest()
    cached = tmp_path / "cache" / digest
    shutil.copytree(split_dir, cached)
    data = bytearray(info.tokenizer or b"")
    data[-40] ^= 1
    (cached / "tokenizer.gguf").write_bytes(data)
    host = FakeHost({"a": info})
    files = new_files(host, tmp_path)
    assert await works(files, digest, "a")
    assert host.asked == ["a"]
    files.close()


def tampered(info: ModelInfo, manifest: Manifest) -> dict[str, ModelInfo | bytes | ShardmeshError]:
    """By name, what a node might hand over that is not what was asked for."""
    tokenizer = bytearray(info.tokenizer or b"")
    tokenizer[-40] ^= 1
    renamed = encode_manifest(msgspec.structs.replace(manifest, model_name="other"))
    replace = msgspec.structs.replace
    return {
        "another manifest": replace(info, manifest=renamed),
        "a broken manifest": replace(info, manifest=b"{"),
        "a manifest too long": encode_cbor(
            {"manifest": bytes(MANIFEST_BYTES_MAX + 1), "tokenizer": info.tokenizer}
        ),
        "another tokenizer": replace(info, tokenizer=bytes(tokenizer)),
        "a cut tokenizer": replace(info, tokenizer=bytes(tokenizer[:-1])),
        "nothing": ModelInfo(manifest=None, tokenizer=None),
        "no tokenizer": replace(info, tokenizer=None),
        "garbage": b"garbage",
        "no answer": UnreachableError("nobody"),
        "no room": BusyError("no room"),
    }


@pytest.mark.parametrize("number", range(10))
async def test_what_is_not_the_named_model_is_refused_and_the_next_node_asked(
    number: int, split_dir: Path, tmp_path: Path, info: ModelInfo
) -> None:
    manifest = manifest_of(split_dir)
    answers = tampered(info, manifest)
    assert len(answers) == 10
    bad = list(answers)[number]
    host = FakeHost({"bad": answers[bad], "good": info})
    files = new_files(host, tmp_path)
    with pytest.raises(UnreachableError) as caught:
        await works(files, manifest.digest(), "bad")
    assert caught.value.code == "NO_TOKENIZER"
    assert not (tmp_path / "cache").exists()
    assert await works(files, manifest.digest(), "bad", "good")
    files.close()


async def test_only_some_nodes_are_asked(split_dir: Path, tmp_path: Path) -> None:
    names = [f"n{i}" for i in range(N_SOURCES_MAX + 2)]
    host = FakeHost({name: BusyError("no room") for name in names})
    with pytest.raises(UnreachableError):
        await works(new_files(host, tmp_path), manifest_of(split_dir).digest(), *names)
    assert host.asked == names[:N_SOURCES_MAX]


async def test_a_digest_that_is_a_path_leads_nowhere(tmp_path: Path, info: ModelInfo) -> None:
    host = FakeHost({"a": info})
    with pytest.raises(ProtocolError) as caught:
        await works(new_files(host, tmp_path), "../" * 20 + "etc/", "a")
    assert caught.value.code == "BAD_MANIFEST"
    assert host.asked == []


async def test_all_who_ask_at_once_fetch_once(
    split_dir: Path, tmp_path: Path, info: ModelInfo
) -> None:
    host = FakeHost({"a": info})
    files = new_files(host, tmp_path)
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(works, files, manifest_of(split_dir).digest(), "a")
    assert host.asked == ["a"]
    files.close()


async def test_a_model_in_use_stays_open_when_another_one_comes(
    split_dir: Path, tmp_path: Path, info: ModelInfo
) -> None:
    first = manifest_of(split_dir)
    second = msgspec.structs.replace(first, model_name="second")
    host = FakeHost({"a": msgspec.structs.replace(info, manifest=encode_manifest(second))})
    files = new_files(host, tmp_path, split_dir)
    async with files.use(replicas(first.digest(), "a")) as model:
        assert await works(files, second.digest(), "a")
        assert model.tokenizer.piece(65)
        files.close()
        assert model.tokenizer.piece(65)
    assert files.n_open == 0


class OneRequest:
    """A stream with one request in it; keeps the answer."""

    def __init__(self, payload: bytes) -> None:
        self._data = len(payload).to_bytes(4, "big") + payload
        self.sent = b""

    async def receive_exactly(self, n_bytes: int) -> bytes:
        taken, self._data = self._data[:n_bytes], self._data[n_bytes:]
        return taken

    async def send_all(self, data: bytes) -> None:
        self.sent += data


@pytest.mark.parametrize("is_known", [True, False])
async def test_a_node_hands_over_what_it_has(
    is_known: bool, split_dir: Path, info: ModelInfo
) -> None:
    host = FakeHost({})
    serve_model_info(host, ShardStore(split_dir))  # type: ignore[arg-type]
    digest = manifest_of(split_dir).digest() if is_known else "0" * 64
    stream = OneRequest(encode_cbor(ModelInfoRequest(manifest_digest=digest)))
    await host.served[MODEL_INFO_PROTOCOL](stream, "somebody")
    found = decode_cbor(stream.sent[4:], ModelInfo)
    assert found == (info if is_known else ModelInfo(manifest=None, tokenizer=None))


async def test_who_takes_a_tokenizer_over_a_slow_line_gets_it(
    split_dir: Path, info: ModelInfo, autojump_clock: trio.testing.MockClock
) -> None:
    class Slow(OneRequest):
        async def send_all(self, data: bytes) -> None:
            await trio.sleep(200)  # which the stream allows for some MB
            await super().send_all(data)

    host = FakeHost({})
    serve_model_info(host, ShardStore(split_dir))  # type: ignore[arg-type]
    digest = manifest_of(split_dir).digest()
    stream = Slow(encode_cbor(ModelInfoRequest(manifest_digest=digest)))
    await host.served[MODEL_INFO_PROTOCOL](stream, "somebody")
    assert decode_cbor(stream.sent[4:], ModelInfo) == info


async def test_a_model_that_nobody_hands_over_holds_up_no_other(
    split_dir: Path, tmp_path: Path
) -> None:
    class Silent(FakeHost):
        async def request(self, *asked: Any, **limits: Any) -> bytes:
            await trio.sleep_forever()
            raise AssertionError

    files = new_files(Silent({}), tmp_path, split_dir)
    digest = manifest_of(split_dir).digest()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(works, files, "0" * 64, "a")
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(20):
            assert await works(files, digest, "a")
        nursery.cancel_scope.cancel()
    files.close()
