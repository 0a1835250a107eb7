"""How wide the hidden states of one token are."""

from __future__ import annotations

from shardmesh.shards.architecture_rules import ArchitectureRules
from shardmesh.shards.gguf_file import GgufFile, refuse
from shardmesh.wire.limits import STREAMS_MAX

_BYTES_OF_F32 = 4


def n_streams_of(gguf: GgufFile, rules: ArchitectureRules) -> int:
    """Hidden states of a token side by side; raises GgufError (theirs) for a senseless number."""
    if not rules.streams_key:
        return 1
    key = f"{gguf.architecture}.{rules.streams_key}"
    n_streams = gguf.get_int(key)
    if not 1 <= n_streams <= STREAMS_MAX:
        refuse(gguf.path, f"has {n_streams} for {key}; 1 to {STREAMS_MAX} make sense", "GGUF_VALUE")
    return n_streams


def row_bytes_of(gguf: GgufFile, rules: ArchitectureRules) -> int:
    """Bytes of one token's hidden states as they travel at most, in float32."""
    n_embd = gguf.get_int(f"{gguf.architecture}.embedding_length")
    return n_embd * n_streams_of(gguf, rules) * _BYTES_OF_F32
