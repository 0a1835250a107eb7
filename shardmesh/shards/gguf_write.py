"""Writes GGUF files in one pass: header, then tensors streamed from where they lie."""

from __future__ import annotations

import concurrent.futures
import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO, Final

from shardmesh.errors import GgufError
from shardmesh.shards.gguf_check import ALIGNMENT_DEFAULT, MAGIC
from shardmesh.shards.gguf_file import NEXT_STEP_DAMAGED, Tensor
from shardmesh.shards.gguf_values import encode_string
from shardmesh.shards.slices import FileContents

VERSION: Final = 3
COPY_BYTES: Final = 4 * 1024 * 1024
"""Read, hashed and written at once: large enough that a call costs nothing beside its bytes."""


def encode_header(contents: FileContents) -> bytes:
    """All before the weights, padded to where they begin."""
    head = bytearray(
        struct.pack("<4sIQQ", MAGIC, VERSION, len(contents.tensors), len(contents.metadata))
    )
    for key, value in contents.metadata.items():
        head += encode_string(key)
        head += value.encode()
    offset = 0
    for tensor in contents.tensors:
        n_dimensions = len(tensor.shape)
        head += encode_string(tensor.name)
        head += struct.pack(f"<I{n_dimensions}Q", n_dimensions, *tensor.shape)
        head += struct.pack("<IQ", tensor.ggml_type, offset)
        offset += padded(tensor.n_bytes)
    head += bytes(padded(len(head)) - len(head))
    return bytes(head)


def n_bytes_of(contents: FileContents) -> int:
    """Size of the file that these contents make."""
    weights = sum(padded(tensor.n_bytes) for tensor in contents.tensors)
    return len(encode_header(contents)) + weights


def write_contents(
    file: BinaryIO, contents: FileContents, progress: Callable[[int], None] | None = None
) -> str:
    """Writes a whole GGUF file and gives its SHA-256 in hex.

    `progress` is called with the bytes added.  Memory stays at a few megabytes beside the header.
    Raises OSError, and GgufError (theirs) when a source ends early.
    """
    digest = hashlib.sha256()
    with concurrent.futures.ThreadPoolExecutor(1) as hasher:
        for piece in _pieces(contents):
            hashing = hasher.submit(digest.update, piece)
            file.write(piece)
            hashing.result()
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()


def padded(n_bytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-n_bytes // ALIGNMENT_DEFAULT) * ALIGNMENT_DEFAULT


def _pieces(contents: FileContents) -> Iterator[bytes | memoryview]:
    """The bytes of the file in order; a piece is good only until the next one is asked for."""
    yield encode_header(contents)
    buffer = bytearray(COPY_BYTES)
    for tensor in contents.tensors:
        if tensor.source is None:
            yield from _zeros(tensor.n_bytes)
        else:
            yield from _read_tensor(tensor.source, buffer)
        yield bytes(padded(tensor.n_bytes) - tensor.n_bytes)


def _read_tensor(tensor: Tensor, buffer: bytearray) -> Iterator[memoryview]:
    remaining = tensor.n_bytes
    with tensor.path.open("rb", buffering=0) as source:
        source.seek(tensor.offset)
        while remaining:
            n_read = source.readinto(memoryview(buffer)[:remaining])
            if not n_read:
                raise GgufError(
                    f"{tensor.path} became shorter while it was read",
                    code="GGUF_TRUNCATED",
                    next_step=NEXT_STEP_DAMAGED,
                )
            remaining -= n_read
            yield memoryview(buffer)[:n_read]


def _zeros(n_bytes: int) -> Iterator[bytes]:
    for start in range(0, n_bytes, COPY_BYTES):
        yield bytes(min(COPY_BYTES, n_bytes - start))
