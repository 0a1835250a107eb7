"""Names of the files in a shard folder; always made here, never taken from outside."""

from __future__ import annotations

from typing import Final

from shardmesh.errors import InputError
from shardmesh.wire.limits import ADAPTERS_MAX, MODEL_LAYERS_MAX

TOKENIZER_NAME: Final = "tokenizer.gguf"


def adapter_name(number: int, shard_id: int) -> str:
    """File name of what the manifest's LoRA adapter `number` changes in a shard.

    Raises InputError (theirs) for numbers that cannot be.
    """
    if not (0 <= number < ADAPTERS_MAX and 0 <= shard_id < MODEL_LAYERS_MAX):
        raise InputError(f"{number}-{shard_id} is not the number of an adapter's part")
    return f"adapter-{number}-{shard_id}.gguf"


def shard_name(shard_id: int) -> str:
    """File name of a shard; raises InputError (theirs) for a number that no shard can have."""
    if not 0 <= shard_id < MODEL_LAYERS_MAX:
        raise InputError(f"{shard_id} is not the number of a shard", code="BAD_SHARD_ID")
    return f"shard-{shard_id}.gguf"
