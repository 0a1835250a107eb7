"""What a data process is told at its start, for tests that run real ones."""

from __future__ import annotations

from pathlib import Path

from support.models import BUILT_IN, write_model

from shardmesh.errors import UnreachableError
from shardmesh.listener.local_messages import Start
from shardmesh.shards.layers import ranges_of_counts
from shardmesh.shards.split import split_model
from shardmesh.wire.link_agreement import LinkGrant


def start_of_tiny_shard(directory: Path, shard_id: int, *, n_embd: int | None = None) -> Start:
    """Writes a model of two layers, cuts it into two shards, and serves one of them."""
    size = {} if n_embd is None else {"n_embd": n_embd}
    model = write_model(directory / "model.gguf", n_layer=2, vocabulary=BUILT_IN, **size)
    manifest = split_model(model, ranges_of_counts([1, 1]), directory, name="tiny")
    return Start(
        shard_path=str(directory / f"shard-{shard_id}.gguf"),
        manifest_digest=manifest.digest(),
        layer_start=shard_id,
        layer_end=shard_id + 1,
        listen_hosts=("127.0.0.1",),
        data_port=0,
        n_ctx=64,
        n_parallel=2,
        n_threads=1,
        n_gpu_layers=0,
        cache_type_k="f16",
        cache_type_v="f16",
        flash_attention=None,
        log_format="pretty",
        log_verbosity=0,
    )


async def no_agreement(peer_id: str, addresses: tuple[str, ...]) -> LinkGrant:
    """For a data process that is to reach nobody."""
    raise UnreachableError("nobody is to be reached here")
