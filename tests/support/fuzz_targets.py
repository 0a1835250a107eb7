"""Every parser of bytes from strangers, as a function of bytes alone.

Each may raise a ShardmeshError, and nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.manifest import Manifest, check_manifest, encode_manifest
from shardmesh.shards.model_link import parse_model_link
from shardmesh.shards.publication import open_publication
from shardmesh.shards.store import layers_of
from shardmesh.wire.announcement import (
    Announcement,
    DirectoryFollow,
    DirectoryNews,
    DirectoryRequest,
    DirectoryResponse,
    check_timely,
    open_signed,
)
from shardmesh.wire.cluster_secret import owner_of
from shardmesh.wire.cluster_update import open_update
from shardmesh.wire.codec import decode_cbor, decode_json, encode_cbor
from shardmesh.wire.commands import decode_command, decode_response
from shardmesh.wire.framing import LENGTH, RecordReader
from shardmesh.wire.hidden_states import body_to_hidden
from shardmesh.wire.limits import MANIFEST_BYTES_MAX
from shardmesh.wire.link_agreement import Endpoint, LinkRequester, answer_request
from shardmesh.wire.messages import HiddenBatch, decode_message, encode_message
from shardmesh.wire.model_info import ModelInfo, ModelInfoRequest
from shardmesh.wire.relay import DialBackAnswer, DialBackRequest, RelayAnswer, RelayRequest
from shardmesh.wire.torrent_file import decode_torrent
from shardmesh.wire.torrent_messages import FileResponse, ModelResponse, TorrentRequest

CLUSTER_OWNER = owner_of(
    Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
)
"""Who signed the good updates of the corpus: the key of 32 zeros."""

PUBLICATION_DIGEST = "2c6086c369d0fecb4150b781bd6a21dcc74167fd60a62e3e6fe4e14e0887c7ab"
"""Of the manifest in the corpus."""

Target = Callable[[bytes], None]


def parse_stream(data: bytes) -> None:
    """A stream of records of messages; what is read must be written as it came."""
    reader = RecordReader()
    found = b""
    for piece in (data[:7], data[7:]):
        for record in reader.feed(piece):
            message, body = decode_message(record)
            frame = encode_message(message, body)
            found += LENGTH.pack(len(frame)) + frame
            if isinstance(message, HiddenBatch):
                body_to_hidden(body, message.n_tokens, message.n_embd, message.dtype)
    reader.check_end()
    if found != data:
        raise AssertionError("a message has two encodings")


def parse_announcement(data: bytes) -> None:
    announcement = decode_cbor(data, Announcement)
    if encode_cbor(announcement) != data:
        raise AssertionError("an announcement has two encodings")
    check_timely(announcement, cluster=announcement.cluster, now_s=announcement.issued_at_s)


def parse_directory(data: bytes) -> None:
    kind = DirectoryRequest if data[:1] == b"\xa3" else DirectoryResponse
    decode_cbor(data, kind)


def parse_directory_news(data: bytes) -> None:
    """What comes over the protocol of news, to either side."""
    decode_cbor(data, DirectoryNews if b"gone" in data else DirectoryFollow)


def parse_agreement(data: bytes) -> None:
    """What comes over the link protocol, to either side."""
    if b"offer" in data or b"refusal" in data:
        LinkRequester("near", "far").grant(data)
    else:
        here = (Endpoint(host="127.0.0.1", port=1),)
        answer_request(data, own_peer_id="far", other_peer_id="near", endpoints=here)


def parse_manifest(data: bytes) -> None:
    manifest = check_manifest(decode_json(data, Manifest))
    manifest.digest()
    if len(encode_manifest(manifest)) > 8 * MANIFEST_BYTES_MAX:
        raise AssertionError("a manifest grew out of bounds")


def parse_gguf(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.gguf")
        path.write_bytes(data)
        layers_of(read_gguf(path))


def parse_model_info(data: bytes) -> None:
    decode_cbor(data, ModelInfoRequest if b"digest" in data else ModelInfo)


def parse_cluster_update(data: bytes) -> None:
    open_update(data, cluster="home", owner=CLUSTER_OWNER)


def parse_relay(data: bytes) -> None:
    """Requests and answers of relays and of dialing back."""
    if b"ports" in data:
        decode_cbor(data, DialBackRequest)
    elif b"reached" in data:
        decode_cbor(data, DialBackAnswer)
    else:
        decode_cbor(data, RelayRequest | RelayAnswer)  # type: ignore[arg-type]


def parse_torrent(data: bytes) -> None:
    if decode_torrent(data).encode() != data:
        raise AssertionError("a torrent has two encodings")


def parse_torrent_message(data: bytes) -> None:
    """What comes over /torrent/1.0, to either side."""
    if b"port" in data and b"type" not in data:
        decode_cbor(data, FileResponse)
    elif b"publication" in data:
        decode_cbor(data, ModelResponse)
    else:
        decode_cbor(data, TorrentRequest)  # type: ignore[arg-type]


def parse_publication(data: bytes) -> None:
    """One of the manifest that the corpus has it of."""
    open_publication(data, manifest_digest=PUBLICATION_DIGEST)


def parse_link(data: bytes) -> None:
    link = parse_model_link(data.decode("utf-8", "replace"))
    if parse_model_link(str(link)) != link:
        raise AssertionError("a link has two meanings")


TARGETS: dict[str, Target] = {
    "stream": parse_stream,
    "announcement": parse_announcement,
    "signed": lambda data: void(open_signed(data)),
    "directory": parse_directory,
    "directory_news": parse_directory_news,
    "command": lambda data: void(decode_command(data)),
    "response": lambda data: void(decode_response(data)),
    "agreement": parse_agreement,
    "manifest": parse_manifest,
    "gguf": parse_gguf,
    "model_info": parse_model_info,
    "cluster_update": parse_cluster_update,
    "relay": parse_relay,
    "torrent": parse_torrent,
    "torrent_message": parse_torrent_message,
    "publication": parse_publication,
    "model_link": parse_link,
}


def void(result: object) -> None:
    """Drops a result: only errors are of interest."""
