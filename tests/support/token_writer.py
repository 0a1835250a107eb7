"""A program of its own that coordinates one text and writes each token as a line, to be killed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import trio

from shardmesh.coordinator.client import open_client
from shardmesh.coordinator.generate import Piece
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.base import SamplingSettings
from shardmesh.swarm.admission import Admission
from shardmesh.wire.cluster_secret import parse_secret

SAMPLING = SamplingSettings(temperature=0.9, repeat_penalty=1.2, seed=5)


def request(prompt: str, n_tokens: int) -> CompletionRequest:
    """The request that is begun by this program and gone on with by another."""
    return CompletionRequest(
        prompt=prompt, n_tokens_max=n_tokens, sampling=SAMPLING, ignore_end=True
    )


async def _write(where: dict[str, str], prompt: str, n_tokens: int) -> None:
    async with open_client(
        bootstraps=[where["bootstrap"]],
        cluster=where["cluster"],
        admission=Admission(parse_secret(os.environ["LLAMA_SECRET"])),
        shards_dir=Path(where["shards_dir"]),
        cache_dir=Path(where["cache_dir"]),
    ) as client:
        async with client.coordinator.complete(request(prompt, n_tokens)) as completion:
            async for item in completion.items:
                if isinstance(item, Piece) and item.token is not None:
                    print(item.token.token, flush=True)


if __name__ == "__main__":
    trio.run(_write, json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
