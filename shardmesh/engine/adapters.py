"""LoRA adapters of a loaded shard: all are in memory, each computation uses one of them or none."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as api

from shardmesh.errors import EngineError, InputError

_SCALE = 1.0


class Adapters:
    """The adapters of one model; llama.cpp frees them together with it."""

    def __init__(self, model: Any, files: Mapping[str, Path | None]) -> None:
        """Loads them; `files` by name, None for one that changes nothing in this shard.

        Raises EngineError (ours) if llama.cpp refuses one.
        """
        self._handles: dict[str, Any] = {"": None}
        for name, path in files.items():
            self._handles[name] = None if path is None else _load(model, path)
        self._used: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._handles if name)

    def check(self, name: str) -> None:
        """Raises InputError (theirs) for an adapter that is not there; empty is none."""
        if name not in self._handles:
            raise InputError(f"there is no LoRA adapter named {name[:64]}", code="NO_ADAPTER")

    def use(self, context: Any, name: str) -> None:
        """Has the next computations use this adapter."""
        handle = self._handles[name]
        if handle is self._used:
            return
        n_adapters = 0 if handle is None else 1
        handles = (api.llama_adapter_lora_p_ctypes * 1)(handle)
        scales = (ctypes.c_float * 1)(_SCALE)
        if api.llama_set_adapters_lora(context, handles, n_adapters, scales) != 0:
            raise EngineError(f"llama.cpp could not use the LoRA adapter {name}")
        self._used = handle


def _load(model: Any, path: Path) -> Any:
    handle = api.llama_adapter_lora_init(model, os.fsencode(path))
    if not handle:
        raise EngineError(
            f"llama.cpp could not load the LoRA adapter {path.name}",
            code="MODEL_NOT_LOADED",
            next_step="run with -v to see its own words; was it made for this model?",
        )
    return handle
