"""What is known of a model file after its header was read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn

from shardmesh.errors import GgufError
from shardmesh.shards.gguf_values import MetadataValue, ValueKind
from shardmesh.wire import limits

NEXT_STEP_DAMAGED: Final = "download or copy the file again; it may be damaged or not whole"

_INTEGERS: Final = frozenset(ValueKind) - {
    ValueKind.STRING,
    ValueKind.ARRAY,
    ValueKind.BOOL,
    ValueKind.FLOAT32,
    ValueKind.FLOAT64,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor's bytes lie; `shape[0]` is the length of a row (ggml order)."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    n_bytes: int
    path: Path
    offset: int  # from the start of the file


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """The header of a model, its parts joined if it comes in several files."""

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[Tensor, ...]
    n_bytes: int  # of all its files

    @property
    def architecture(self) -> str:
        return self.get_text("general.architecture")

    @property
    def n_layer(self) -> int:
        """Number of layers without those of `n_nextn`.

        Raises GgufError (theirs) outside 1..MODEL_LAYERS_MAX.
        """
        n_layer = self.get_int(f"{self.architecture}.block_count") - self.n_nextn
        if not 1 <= n_layer <= limits.MODEL_LAYERS_MAX:
            refuse(self.path, f"has {n_layer} layers", "GGUF_VALUE")
        return n_layer

    @property
    def n_nextn(self) -> int:
        """Layers for multi-token prediction, behind the others."""
        n_nextn = self.get_int(f"{self.architecture}.nextn_predict_layers", 0)
        if not 0 <= n_nextn <= limits.MODEL_LAYERS_MAX:
            refuse(self.path, f"has {n_nextn} layers for multi-token prediction", "GGUF_VALUE")
        return n_nextn

    def get_int(self, key: str, default: int | None = None) -> int:
        """An integer of the metadata; raises GgufError (theirs) when missing or another type."""
        value = self._scalar(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            refuse(self.path, f"has no whole number under {key}", "GGUF_VALUE")
        return value

    def get_text(self, key: str, default: str | None = None) -> str:
        """A string of the metadata; raises GgufError (theirs) when missing or another type."""
        value = self._scalar(key, default)
        if not isinstance(value, str):
            refuse(self.path, f"has no text under {key}", "GGUF_VALUE")
        return value

    def get_per_layer(self, key: str, n_layer: int, default: int) -> tuple[int, ...]:
        """An integer for each layer: an array, or one value for all of them."""
        value = self.metadata.get(key)
        if value is None or not value.is_array:
            return (self.get_int(key, default),) * n_layer
        if value.kind not in _INTEGERS or value.n_items < n_layer:
            refuse(self.path, f"has no {n_layer} whole numbers under {key}", "GGUF_VALUE")
        return tuple(int(item) for item in value.items()[:n_layer])

    def _scalar(self, key: str, default: int | str | None) -> object:
        value = self.metadata.get(key)
        if value is None:
            return default
        return None if value.is_array else value.items()[0]


def refuse(path: Path, what: str, code: str) -> NoReturn:
    """Raises GgufError (theirs): the path, then what is wrong with it, at most 300 characters."""
    raise GgufError(f"{path} {what[:300]}", code=code, next_step=NEXT_STEP_DAMAGED)
