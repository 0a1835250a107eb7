"""Models in several files, as large ones are published."""

from __future__ import annotations

import struct
from pathlib import Path

from support.models import TensorData, write_gguf

from shardmesh.shards.gguf_check import read_gguf


def write_in_parts(model: Path, folder: Path) -> list[Path]:
    """The same model in two files."""
    source, data = read_gguf(model), model.read_bytes()
    values = {key: value.encode() for key, value in source.metadata.items()}
    tensors = [
        TensorData(t.name, t.shape, t.ggml_type, data[t.offset : t.offset + t.n_bytes])
        for t in source.tensors
    ]
    paths = []
    for part, some in enumerate((tensors[:7], tensors[7:])):
        own = {
            "split.no": struct.pack("<IH", 2, part),
            "split.count": struct.pack("<IH", 2, 2),
            "split.tensors.count": struct.pack("<Ii", 5, len(tensors)),
        }
        paths.append(folder / f"p-{part + 1:05d}-of-00002.gguf")
        write_gguf(paths[-1], {**own, **(values if part == 0 else {})}, some)
    return paths
