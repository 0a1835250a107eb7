"""Torrents of strangers: only what Shardmesh itself would make is taken."""

from __future__ import annotations

import hashlib
from typing import Any

import libtorrent as lt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import ProtocolError
from shardmesh.wire.bencode import Bencoded, decode_bencode, encode_bencode
from shardmesh.wire.limits import TORRENT_BYTES_MAX, TORRENT_NESTING_MAX
from shardmesh.wire.merkle import PIECE_BYTES_MAX, piece_bytes_of, root_of_pieces
from shardmesh.wire.torrent_file import TorrentFile, decode_torrent, is_file_name

PIECE = 256 * 1024
HASHES = [hashlib.sha256(bytes([number])).digest() for number in range(5)]

values: st.SearchStrategy[Any] = st.recursive(
    st.integers(-(2**63) + 1, 2**63 - 1) | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def torrent(name: str = "shard-0.gguf", n_pieces: int = 5) -> TorrentFile:
    layer = HASHES[:n_pieces] if n_pieces > 1 else []
    root = root_of_pieces(layer, PIECE) if layer else HASHES[0]
    return TorrentFile(
        name=name,
        n_bytes=(n_pieces - 1) * PIECE + 7,
        pieces_root=root,
        piece_layer=b"".join(layer),
    )


def tree(**changes: Any) -> dict[bytes, Any]:
    """The dictionaries of a good torrent, `info` changed."""
    value: Any = decode_bencode(torrent().encode())
    for key, change in changes.items():
        value[b"info"][key.replace("_", " ").encode()] = change
    return dict(value)


def depth_of(value: Bencoded) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 0


# -- bencode -----------------------------------------------------------------------------------


@given(values)
def test_what_is_encoded_is_decoded(value: Bencoded) -> None:
    data = encode_bencode(value)
    if depth_of(value) > TORRENT_NESTING_MAX:
        with pytest.raises(ProtocolError):
            decode_bencode(data)
    else:
        assert decode_bencode(data) == value


@given(st.binary(max_size=60) | st.text("dlie0123456789:-a", max_size=60).map(str.encode))
def test_whatever_is_decoded_has_one_encoding(data: bytes) -> None:
    try:
        value = decode_bencode(data)
    except ProtocolError:
        pass
    else:
        assert encode_bencode(value) == data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"i01e",
        b"i-0e",
        b"ie",
        b"i 1e",
        b"i1",
        b"i" + b"9" * 100 + b"e",
        b"03:abc",
        b"4:abc",
        b"99999999999999999999:a",
        b"-1:a",
        b"l" * 1000,
        b"d" + b"1:ad" * 1000,
        b"d1:bi1e1:ai1ee",
        b"d1:ai1e1:ai1ee",
        b"di1ei1ee",
        b"d1:a",
        b"i1ei2e",
        b"x",
        bytes(TORRENT_BYTES_MAX + 1),
    ],
)
def test_bencode_that_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_bencode(data)
    assert caught.value.code == "BAD_TORRENT"


# -- torrents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_pieces", [1, 2, 5])
def test_a_torrent_is_what_it_was_and_libtorrent_agrees(n_pieces: int) -> None:
    made = torrent(n_pieces=n_pieces)
    assert decode_torrent(made.encode()) == made
    read = lt.load_torrent_buffer(made.encode()).ti
    assert read.info_hashes().v2.to_bytes() == made.info_hash()
    assert read.info_hashes().v1.is_all_zeros()
    assert read.priv()
    files = read.layout()
    assert (files.file_path(0), files.file_size(0)) == (made.name, made.n_bytes)
    for number in range(1, files.num_files()):  # it fills up the last piece with nothing
        assert files.file_flags(number) & lt.file_flags_t.flag_pad_file


NAMES = [
    "",
    ".gguf",
    ".hidden.gguf",
    "../shard-0.gguf",
    "/etc/shard-0.gguf",
    "C:\\shard-0.gguf",
    "a/b.gguf",
    "shard-0.gguf\0",
    "shard\n-0.gguf",
    "\u202eshard.gguf",
    "shard-0.bin",
    "..",
    "a" * 300 + ".gguf",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_refused(name: str) -> None:
    assert not is_file_name(name)
    with pytest.raises(ProtocolError):
        decode_torrent(torrent(name).encode())


def hostile() -> dict[str, Any]:
    """What else must not come in, after the list of libtorrent's own test torrents."""
    good = tree()
    info, layers = good[b"info"], good[b"piece layers"]
    leaf = info[b"file tree"][b"shard-0.gguf"][b""]
    root = leaf[b"pieces root"]

    def with_leaf(**changes: Any) -> dict[bytes, Any]:
        changed = {**leaf, **{key.replace("_", " ").encode(): v for key, v in changes.items()}}
        return tree(file_tree={b"shard-0.gguf": {b"": changed}})

    return {
        "not a dictionary": [1, 2],
        "no info": {b"piece layers": layers},
        "info is a list": {**good, b"info": []},
        "no layers": {b"info": info},
        "layers are a list": {**good, b"piece layers": []},
        "a layer that is no string": {**good, b"piece layers": {root: 5}},
        "no layer": {**good, b"piece layers": {}},
        "a layer cut": {**good, b"piece layers": {root: layers[root][:-32]}},
        "a layer not of whole hashes": {**good, b"piece layers": {root: layers[root][:-1]}},
        "a wrong hash in the layer": {**good, b"piece layers": {root: bytes(len(layers[root]))}},
        "a layer too many": {**good, b"piece layers": {**layers, bytes(32): bytes(32)}},
        "trackers": {**good, b"announce": b"http://127.0.0.1:8080/"},
        "web seeds": {**good, b"url-list": [b"http://127.0.0.1/"]},
        "http seeds": {**good, b"httpseeds": [b"http://127.0.0.1/"]},
        "a creation date": {**good, b"creation date": -1},
        "collections": {**good, b"info": {**info, b"collections": [b"x"]}},
        "a pad file": with_leaf(attr=b"p"),
        "a file without a name": tree(file_tree={b"": {b"": leaf}}),
        "a file without anything": tree(file_tree={b"shard-0.gguf": {}}),
        "a path in the tree": tree(file_tree={b"../shard-0.gguf": {b"": leaf}}),
        "pieces of no power of two": tree(piece_length=3 * 2**17),
        "dht nodes": {**good, b"nodes": [[b"127.0.0.1", 1]]},
        "no length": tree(file_tree={b"shard-0.gguf": {b"": {b"pieces root": root}}}),
        "negative length": with_leaf(length=-1),
        "no bytes": with_leaf(length=0),
        "enormous length": with_leaf(length=2**62),
        "length as text": with_leaf(length=b"5"),
        "a short root": with_leaf(pieces_root=root[:-1]),
        "an empty root": with_leaf(pieces_root=b""),
        "attributes of a link": with_leaf(attr=b"l"),
        "a link": with_leaf(symlink_path=[b"..", b"x"]),
        "two files": tree(file_tree={**info[b"file tree"], b"x.gguf": {b"": leaf}}),
        "a folder": tree(file_tree={b"shard-0.gguf": {b"x.gguf": {b"": leaf}}}),
        "a file that is also a folder": tree(
            file_tree={b"shard-0.gguf": {b"": leaf, b"x": {b"": leaf}}}
        ),
        "another name in the tree": tree(file_tree={b"x.gguf": {b"": leaf}}),
        "an empty tree": tree(file_tree={}),
        "a tree that is a list": tree(file_tree=[]),
        "deep": tree(file_tree={b"a": {b"b": {b"c": {b"d": {b"e": {b"": leaf}}}}}}),
        "no name": {**good, b"info": {k: v for k, v in info.items() if k != b"name"}},
        "a name that is no text": tree(name=b"\xff\xfe.gguf"),
        "version 1": tree(meta_version=1),
        "version 3": tree(meta_version=3),
        "a hybrid": tree(pieces=bytes(20)),
        "version 1 files": tree(files=[{b"length": 1, b"path": [b"..", b"x"]}]),
        "public": tree(private=0),
        "one byte pieces": tree(piece_length=1),
        "no piece length": tree(piece_length=0),
        "negative piece length": tree(piece_length=-(2**18)),
        "enormous pieces": tree(piece_length=2**40),
        "many pieces": tree(piece_length=16 * 1024),
        "a certificate": {**good, b"info": {**info, b"ssl-cert": b"x"}},
        "similar torrents": {**good, b"info": {**info, b"similar": [bytes(20)]}},
    }


@pytest.mark.parametrize("what", sorted(hostile()))
def test_a_torrent_that_is_refused(what: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_torrent(encode_bencode(hostile()[what]))
    assert caught.value.code == "BAD_TORRENT"


@pytest.mark.parametrize(
    ("n_bytes", "piece_bytes"),
    [(1, PIECE), (2048 * PIECE, PIECE), (2048 * PIECE + 1, 2 * PIECE), (2**40, PIECE_BYTES_MAX)],
)
def test_the_piece_length_follows_from_the_size(n_bytes: int, piece_bytes: int) -> None:
    assert piece_bytes_of(n_bytes) == piece_bytes
