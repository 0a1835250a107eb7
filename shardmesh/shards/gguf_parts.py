"""Models that come in several files, named `<model>-00001-of-00003.gguf`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

from shardmesh.errors import GgufError
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.wire.limits import GGUF_PARTS_MAX, GGUF_TENSORS_MAX

SPLIT_COUNT_KEY: Final = "split.count"
SPLIT_NUMBER_KEY: Final = "split.no"

_PART_NAME: Final = re.compile(r"(?P<model>.+)-(?P<part>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


def part_paths(path: Path) -> list[Path]:
    """All files of the model that `path` is a part of, in order; most often only itself.

    Raises GgufError (theirs) when one is missing.
    """
    match = _PART_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= count <= GGUF_PARTS_MAX:
        raise GgufError(f"{path} says that it is one of {count} files", code="GGUF_PARTS")
    paths = [
        path.with_name(f"{match['model']}-{part:05d}-of-{count:05d}.gguf")
        for part in range(1, count + 1)
    ]
    missing = [each.name for each in paths if not each.exists()]
    if missing:
        raise GgufError(
            f"{path} is one of {count} files, but {missing[0]} is missing",
            code="GGUF_PARTS",
            next_step="put all files of the model into one folder",
        )
    return paths


def join_parts(path: Path, parts: Sequence[GgufFile]) -> GgufFile:
    """One model of all its parts: the first one's metadata and path, everybody's tensors.

    llama.cpp finds the others by the name of the first, whatever a link leads to.

    Raises GgufError (theirs) when they do not belong together.
    """
    first = parts[0]
    for number, part in enumerate(parts):
        count = part.get_int(SPLIT_COUNT_KEY, 1)
        if max(count, 1) != len(parts) or part.get_int(SPLIT_NUMBER_KEY, 0) != number:
            raise GgufError(
                f"{part.path} is not part {number + 1} of {len(parts)} by what it says itself",
                code="GGUF_PARTS",
                next_step="keep the names that the files of a model were published with",
            )
    tensors = tuple(itertools.chain.from_iterable(part.tensors for part in parts))
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GgufError(f"two parts of {path} have a tensor of one name", code="GGUF_PARTS")
    if len(tensors) > GGUF_TENSORS_MAX:
        raise GgufError(f"{path} has {len(tensors)} tensors in all its parts", code="GGUF_LIMIT")
    return GgufFile(
        path=first.path,
        version=first.version,
        alignment=first.alignment,
        metadata=MappingProxyType(
            {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
        ),
        tensors=tensors,
        n_bytes=sum(part.n_bytes for part in parts),
    )
