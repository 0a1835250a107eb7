"""A mesh of real processes on this machine, to be measured through a real coordinator."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from benchmarks.generation import GREEDY, N_THREADS, Generation
from shardmesh.cli.demo_mesh import DemoMesh, OptionsOf, no_options, start_mesh
from shardmesh.coordinator.client import Client, open_client
from shardmesh.coordinator.generate import Finished, Piece
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.coordinator.timings import Timings
from shardmesh.engine.base import SamplingSettings
from shardmesh.errors import OurError
from shardmesh.shards.costs import costs_of
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.plan import plan_shards
from shardmesh.shards.split import default_name, split_model
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.cluster_files import ClusterFiles
from shardmesh.swarm.torrents.exchange import ask_for_file

CLUSTER: Final = "benchmarks"


class Mesh:
    """A running mesh; idle while nothing is asked of it."""

    def __init__(self, client: Client, where: Sequence[str]) -> None:
        self._client = client
        self.where = tuple(where)  # flags of commands that are to find this mesh
        self.timings: list[Timings] = []  # of all generations

    async def generate(
        self,
        prompt: str,
        n_tokens: int,
        *,
        sampling: SamplingSettings = GREEDY,
        n_drafts: int | None = 0,
        reuse_prefix: bool = False,
    ) -> Generation:
        """A generation that does not stop at the model's end of text; plain, if not told."""
        request = CompletionRequest(
            prompt=prompt,
            n_tokens_max=n_tokens,
            sampling=sampling,
            n_drafts=n_drafts,
            reuse_prefix=reuse_prefix,
            ignore_end=True,
        )
        tokens: list[int] = []
        asked_s = time.perf_counter()
        first_s = 0.0
        text_s: list[float] = []
        async with self._client.coordinator.complete(request) as completion:
            async for item in completion.items:
                first_s = first_s or time.perf_counter() - asked_s
                if isinstance(item, Finished):
                    self.timings.append(item.timings)
                    return Generation(
                        n_prompt_tokens=completion.n_prompt_tokens,
                        tokens=tuple(tokens),
                        first_token_s=first_s,
                        total_s=item.timings.total_s,
                        decode_tokens_per_s=item.timings.decode_tokens_per_s,
                        text_s=tuple(text_s),
                    )
                if item.text:
                    text_s.append(time.perf_counter() - asked_s)
                if isinstance(item, Piece) and item.token is not None:
                    tokens.append(item.token.token)
        raise OurError("a generation ended without its last item")

    async def torrent_port(self, info_hash: bytes) -> int:
        """Where the first listener gives a file, 0 while it does not.

        It has been asked by a member then, and lets this machine fetch the file.
        """
        listener = self._client.directory.all()[0]
        self._client.host.learn(listener.peer_id, listener.addresses)
        source = await ask_for_file(
            self._client.host, listener.peer_id, info_hash, wants_torrent=False, port=0
        )
        return source.port


def split(model: Path, n_shards: int, folder: Path) -> Path:
    """Cuts the model into `folder`/shards; the path of its tokenizer."""
    source = read_gguf(model)
    ranges = plan_shards(costs_of(source), n_shards)
    split_model(model, ranges, folder / "shards", name=default_name(source))
    return folder / "shards" / "tokenizer.gguf"


@asynccontextmanager
async def cut_model(
    model: Path, n_shards: int, progress: Callable[[str], None]
) -> AsyncIterator[tuple[Path, Path]]:
    """A folder with the shards, which is gone when the block is left, and the tokenizer in it."""
    with tempfile.TemporaryDirectory(prefix="shardmesh-bench-") as name:
        folder = Path(name)
        progress(f"cutting the model into {n_shards} shards")
        tokenizer = await trio.to_thread.run_sync(split, model, n_shards, folder)
        progress("starting the mesh")
        yield folder, tokenizer


@asynccontextmanager
async def open_mesh(
    folder: Path,
    n_shards: int,
    listen_options: Sequence[str] = (),
    options_of: OptionsOf = no_options,
) -> AsyncIterator[Mesh]:
    """A mesh of the shards in `folder`/shards; all of it has ended when the block is left."""
    async with (
        start_mesh(
            folder,
            n_shards,
            cluster=CLUSTER,
            on_change=lambda mesh: None,
            n_threads=N_THREADS,
            listen_options=listen_options,
            options_of=options_of,
        ) as nodes,
        open_client(
            bootstraps=[nodes.bootstrap_address],
            cluster=CLUSTER,
            admission=Admission(ClusterFiles(folder / "state", CLUSTER).make()),
            shards_dir=folder / "shards",
            cache_dir=folder / "cache",
        ) as client,
    ):
        yield Mesh(client, where_of(nodes, folder))


def where_of(nodes: DemoMesh, folder: Path) -> tuple[str, ...]:
    """Flags of commands that are to find these nodes, started with `folder`."""
    state = ("--state-dir", str(folder / "state"))
    at = ("--bootstrap", nodes.bootstrap_address, "--shards-dir", str(folder / "shards"))
    return ("--cluster", CLUSTER, *at, *state)
