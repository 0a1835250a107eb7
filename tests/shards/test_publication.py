"""Signed manifests and model links: nothing altered, nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.manifests import a_manifest

from shardmesh.errors import InputError, ProtocolError, ShardmeshError
from shardmesh.shards.manifest import Manifest
from shardmesh.shards.model_link import ModelLink, parse_model_link
from shardmesh.shards.publication import (
    Publication,
    open_publication,
    read_publication,
    sign_publication,
    write_publication,
)
from shardmesh.swarm.identity import Identity, new_identity
from shardmesh.wire.codec import encode_cbor
from shardmesh.wire.limits import PUBLICATION_BYTES_MAX


def publication(of: Manifest | None = None) -> Publication:
    of = of or a_manifest()
    hashes = tuple(bytes([i]) * 32 for i in range(len(of.shards)))
    return Publication(
        manifest=of, shard_info_hashes=hashes, tokenizer_info_hash=b"t" * 32, adapter_info_hashes=()
    )


PUBLISHER = new_identity()
SIGNED = sign_publication(publication(), PUBLISHER)
DIGEST = a_manifest().digest()


def test_what_is_signed_is_opened() -> None:
    opened = open_publication(SIGNED, manifest_digest=DIGEST, publisher=PUBLISHER.public_key)
    assert (opened.publication, opened.publisher) == (publication(), PUBLISHER.public_key)
    assert [(f.name, f.n_bytes, f.info_hash[:1]) for f in opened.publication.files()] == [
        ("shard-0.gguf", 100, b"\0"),
        ("shard-1.gguf", 101, b"\1"),
        ("shard-2.gguf", 102, b"\2"),
        ("tokenizer.gguf", 7, b"t"),
    ]
    with pytest.raises(InputError, match="no shard 3"):
        opened.publication.shard(3)


def code_of(signed: bytes, **options: Any) -> str:
    with pytest.raises(ProtocolError) as caught:
        open_publication(signed, **{"manifest_digest": DIGEST, **options})
    return caught.value.code


def test_another_publisher_than_the_links() -> None:
    assert code_of(SIGNED, publisher=new_identity().public_key) == "WRONG_PUBLISHER"


def test_another_manifest_than_asked_for() -> None:
    other = sign_publication(publication(a_manifest(model_name="other")), PUBLISHER)
    assert code_of(other) == "BAD_MANIFEST"


def test_a_changed_digest_is_not_what_was_signed() -> None:
    changed = publication()
    changed = msgspec.structs.replace(changed, shard_info_hashes=(b"x" * 32,) * 3)
    swapped = SIGNED.replace(encode_cbor(publication()), encode_cbor(changed))
    assert swapped != SIGNED
    assert code_of(swapped) == "BAD_SIGNATURE"


class WithoutDomain(Identity):
    """Signs what it likes, not what it is given."""

    def sign(self, data: bytes) -> bytes:
        return super().sign(data.partition(b"\0")[2])


def test_a_signature_for_something_else_is_none() -> None:
    signer = WithoutDomain(new_identity()._private_key)
    assert code_of(sign_publication(publication(), signer)) == "BAD_SIGNATURE"


def test_a_manifest_that_contradicts_itself_is_refused_although_signed() -> None:
    broken = msgspec.structs.replace(a_manifest(), n_layer=7)
    body = publication(broken)
    with pytest.raises(ShardmeshError):
        sign_publication(body, PUBLISHER)


def test_not_one_info_hash_for_each_shard() -> None:
    with pytest.raises(ValueError, match="info-hash"):
        Publication(
            manifest=a_manifest(),
            shard_info_hashes=(b"x" * 32,),
            tokenizer_info_hash=b"t" * 32,
            adapter_info_hashes=(),
        )


def test_too_long_is_not_looked_at() -> None:
    assert code_of(bytes(PUBLICATION_BYTES_MAX + 1)) == "TOO_LARGE"


@given(st.integers(0, len(SIGNED) - 1), st.integers(1, 255))
def test_no_altered_byte_is_believed(at: int, flip: int) -> None:
    altered = bytearray(SIGNED)
    altered[at] ^= flip
    with pytest.raises(ShardmeshError):
        open_publication(bytes(altered), manifest_digest=DIGEST, publisher=PUBLISHER.public_key)


def test_beside_its_manifest(tmp_path: Path) -> None:
    assert read_publication(tmp_path, a_manifest()) is None
    write_publication(tmp_path, SIGNED)
    opened = read_publication(tmp_path, a_manifest())
    assert opened is not None
    assert opened.signed == SIGNED
    with pytest.raises(ProtocolError):
        read_publication(tmp_path, a_manifest(model_name="other"))


# -- links -------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=30)
addresses = st.lists(
    st.from_regex(r"/(ip4|dns)/[a-z0-9.]{1,20}/tcp/[0-9]{1,5}(/p2p/\w{5})?", fullmatch=True).filter(
        str.isascii
    ),
    max_size=4,
    unique=True,
)


@given(names, st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), addresses)
def test_a_link_that_is_printed_is_read(
    name: str, digest: bytes, key: bytes, bootstraps: list[str]
) -> None:
    if len(name.encode()) > 100:
        return
    link = ModelLink(
        model_name=name,
        manifest_digest=digest.hex(),
        publisher=key,
        bootstraps=tuple(bootstraps),
    )
    text = str(link)
    assert text.isascii()
    assert " " not in text
    assert parse_model_link(f" {text}\n") == link


M, K = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "http://x",
        "shardmesh:",
        "shardmesh:x",
        f"shardmesh:x?m={M}",
        f"shardmesh:?m={M}&k={K}",
        f"shardmesh:x?m={M[1:]}&k={K}",
        f"shardmesh:x?m={M.upper()}&k={K}",
        f"shardmesh:x?m={M}&k={K}&m={M}",
        f"shardmesh:x?m={M}&k={K}&z=1",
        f"shardmesh:x?m={M}&k={K}&b=",
        f"shardmesh:x?m={M}&k={K}&b=127.0.0.1:5",
        f"shardmesh:%00?m={M}&k={K}",
        f"shardmesh:%ff?m={M}&k={K}",
        f"shardmesh:x?m={M}&k={K}" + "&b=/ip4/127.0.0.1/tcp/1" * 9,
        f"shardmesh:{'x' * 3000}?m={M}&k={K}",
        f"shardmesh:ä?m={M}&k={K}",
    ],
)
def test_what_is_no_link(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_model_link(text)
    assert caught.value.code == "BAD_LINK"
