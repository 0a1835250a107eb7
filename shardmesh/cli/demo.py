"""`shardmesh demo`: a mesh on this machine, from nothing to a fairy tale and a proof."""

from __future__ import annotations

import dataclasses
import secrets
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shardmesh.cli.numbers import PORT, FiniteRange
from shardmesh.cli.options import cache_dir
from shardmesh.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from shardmesh.cli.demo_mesh import DemoMesh
    from shardmesh.coordinator.client import Client
    from shardmesh.coordinator.request import CompletionRequest
    from shardmesh.coordinator.timings import Timings
    from shardmesh.shards.manifest import Manifest

PROMPT = "Once upon a time there was a king who"
CLUSTER = "demo"
EXIT_DIFFERENT = 1


@click.command("demo")
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--shards", "n_shards", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Any GGUF model.  [default: the fairy-tale model of this package]",
)
@click.option(
    "--max-tokens", "n_tokens_max", type=click.IntRange(1), default=160, show_default=True
)
@click.option("--temperature", type=FiniteRange(0, 100), default=0.7, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="[default: a new one each time]")
@click.option("--web", is_flag=True, help="Run a gateway too, and stay up until Ctrl-C.")
@click.option(
    "--port",
    type=PORT,
    default=8080,
    show_default=True,
    help="TCP port of the gateway, with --web; 0 picks one.",
)
@click.option("--keep", is_flag=True, help="Stay up until Ctrl-C and show how to talk to the mesh.")
def command(
    prompt: str,
    n_shards: int,
    model: Path | None,
    n_tokens_max: int,
    temperature: float,
    seed: int | None,
    web: bool,
    port: int,
    keep: bool,
) -> int:
    """Cut a model, start a bootstrap and a listener for each shard, and let them write.

    Everything runs in processes of its own on this machine and ends with this command.  Exit code
    1: the text is not that of llama.cpp in one process.
    """
    import trio
    from rich.console import Console

    from shardmesh.coordinator.request import CompletionRequest
    from shardmesh.demo_model import DEMO_MODEL
    from shardmesh.engine.base import SamplingSettings
    from shardmesh.logs import configure_logging

    configure_logging("pretty", verbosity=-1, stream=sys.stderr)
    request = CompletionRequest(
        prompt=prompt,
        n_tokens_max=n_tokens_max,
        sampling=SamplingSettings(
            temperature=temperature, seed=secrets.randbits(32) if seed is None else seed
        ),
    )
    if web:
        _require_free(port)
    with tempfile.TemporaryDirectory(prefix="shardmesh-demo-") as folder:
        web_port = port if web else None
        demo = Demo(Console(), model or DEMO_MODEL, Path(folder), n_shards, request, web_port)
        return 0 if trio.run(demo.run, keep) else EXIT_DIFFERENT


def _require_free(port: int) -> None:
    """Raises InputError (theirs) for a taken port now, not when everything else is done."""
    from shardmesh.web.server import bind_sockets

    for bound in bind_sockets("127.0.0.1", [port]):
        bound.close()


@dataclasses.dataclass
class Demo:
    """One run of the demo."""

    console: Console
    model: Path
    folder: Path
    n_shards: int
    request: CompletionRequest
    web_port: int | None = None  # None: without a gateway

    async def run(self, keep: bool) -> bool:
        """Shows everything; says whether the mesh wrote what one llama.cpp process writes.

        All processes have ended then, also after Ctrl-C, SIGTERM and a closed terminal.
        """
        import trio

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_interrupted_by_signals)
            is_equal = await self._run(keep)
            nursery.cancel_scope.cancel()
        return is_equal

    async def _run(self, keep: bool) -> bool:
        import trio
        from rich.live import Live

        from shardmesh.cli.demo_mesh import start_mesh

        manifest = await trio.to_thread.run_sync(self._split)
        live = Live(console=self.console, auto_refresh=False)
        live.start()

        def show(mesh: DemoMesh) -> None:
            live.update(_processes_table(mesh, manifest), refresh=True)

        try:
            async with start_mesh(
                self.folder, self.n_shards, cluster=CLUSTER, on_change=show
            ) as mesh:
                live.stop()
                return await self._use(mesh, manifest, keep)
        finally:
            live.stop()

    def _split(self) -> Manifest:
        from shardmesh.shards.costs import costs_of
        from shardmesh.shards.gguf_check import read_gguf
        from shardmesh.shards.plan import plan_shards
        from shardmesh.shards.split import default_name, split_model

        source = read_gguf(self.model)
        ranges = plan_shards(costs_of(source), self.n_shards)
        shards = self.folder / "shards"
        try:
            manifest = split_model(self.model, ranges, shards, name=default_name(source))
        except InputError as error:
            if error.code == "NO_ROOM":  # there is no --out here
                error.next_step = "free some space, or set TMPDIR to a folder on another disk"
            raise
        n_bytes = sum(shard.n_bytes for shard in manifest.shards)
        self.console.print(
            f"{manifest.model_name} ({manifest.architecture}, {manifest.n_layer} layers, "
            f"{manifest.quantization}) cut into {self.n_shards} shards, {n_bytes / 2**20:.1f} MiB",
            markup=False,
        )
        return manifest

    async def _use(self, mesh: DemoMesh, manifest: Manifest, keep: bool) -> bool:
        import trio

        from shardmesh.coordinator.client import open_client
        from shardmesh.swarm.admission import Admission

        async with open_client(
            bootstraps=[mesh.bootstrap_address],
            cluster=CLUSTER,
            admission=Admission(mesh.secret),
            shards_dir=self.folder / "shards",
            cache_dir=cache_dir(),
        ) as client:
            tokens = await self._write(client)
            is_equal = await trio.to_thread.run_sync(self._prove, tokens, manifest.piece_tokens)
        if self.web_port is not None:
            self._show_how_to_talk(mesh)
            await self._serve_web(mesh, self.web_port)
        elif keep:
            self._show_how_to_talk(mesh)
            await trio.sleep_forever()
        return is_equal

    async def _serve_web(self, mesh: DemoMesh, port: int) -> None:
        """A gateway in this process, until it is cancelled."""
        from shardmesh.swarm.admission import Admission
        from shardmesh.web.gateway import GatewayOptions
        from shardmesh.web.guard import GuardSettings
        from shardmesh.web.run import WebOptions, serve_web
        from shardmesh.web.tokens import ApiTokens

        def show(url: str) -> None:
            self.console.print(f"\nThe gateway: [link={url}]{url}[/link]", highlight=False)
            self.console.print(f"  an OpenAI client: base_url={url}v1", highlight=False)

        options = WebOptions(
            host="127.0.0.1",
            port=port,
            ws_port=None,
            guard=GuardSettings(tokens=ApiTokens()),
            gateway=GatewayOptions(
                bootstraps=[mesh.bootstrap_address],
                cluster=CLUSTER,
                admission=Admission(mesh.secret),
                shards_dir=self.folder / "shards",
                cache_dir=cache_dir(),
                state_dir=self.folder / "state",
            ),
        )
        await serve_web(options, show)

    async def _write(self, client: Client) -> list[int]:
        """Streams the text; its tokens."""
        from shardmesh.coordinator.generate import Finished, Piece

        tokens: list[int] = []
        finished: Finished | None = None
        self.console.print()
        self.console.print(self.request.prompt, style="bold", end="", highlight=False, markup=False)
        async with client.coordinator.complete(self.request) as completion:
            async for item in completion.items:
                if isinstance(item, Piece):
                    self.console.out(item.text, end="", highlight=False)
                    if item.token is not None:
                        tokens.append(item.token.token)
                else:
                    finished = item
        self.console.print("\n")
        if finished is not None:
            self._show_speed(len(tokens), finished.timings)
        return tokens

    def _show_speed(self, n_tokens: int, timings: Timings) -> None:
        rate = timings.decode_tokens_per_s
        speed = f", then {rate:.1f} tokens/s" if rate is not None else ""
        self.console.print(
            f"{n_tokens} tokens through {self.n_shards} stages in processes of their own: the "
            f"first after {timings.first_token_s * 1e3:.0f} ms{speed}",
            highlight=False,
        )

    def _prove(self, tokens: list[int], piece_tokens: int) -> bool:
        """Writes the same text with the whole model in this process and compares."""
        from shardmesh.cli.demo_mesh import threads_per_node
        from shardmesh.coordinator.reference import reference_tokens
        from shardmesh.engine.base import EngineOptions
        from shardmesh.engine.llama import load_engine
        from shardmesh.engine.tokenizer import Tokenizer

        with Tokenizer.open(self.folder / "shards" / "tokenizer.gguf") as tokenizer:
            prompt = tokenizer.encode(self.request.prompt or "")
        options = EngineOptions(
            n_parallel=1, n_threads=threads_per_node(self.n_shards), own_kernels=False
        )
        engine = load_engine(self.model, options)
        try:
            whole = reference_tokens(
                engine,
                prompt,
                self.request.sampling,
                len(tokens),
                piece_tokens=piece_tokens,
            )
        finally:
            engine.close()
        if list(whole.tokens) != tokens:
            self.console.print("[red]✗ llama.cpp in one process writes another text[/red]")
            return False
        rate = whole.decode_tokens_per_s
        speed = f", at {rate:.1f} tokens/s" if rate is not None else ""
        self.console.print(
            "[green]✓[/green] llama.cpp in one process writes the same "
            f"{len(tokens)} tokens{speed}",
            highlight=False,
        )
        return True

    def _show_how_to_talk(self, mesh: DemoMesh) -> None:
        from shardmesh.swarm.cluster_files import ClusterFiles

        secret = ClusterFiles(self.folder / "state", CLUSTER).secret_path
        where = f"--cluster {CLUSTER} --bootstrap {mesh.bootstrap_address} --secret-file {secret}"
        self.console.print("\nThe mesh stays up until Ctrl-C. From another terminal:")
        for line in (
            f"shardmesh status {where}",
            f'shardmesh run {where} --timings "Far away, where the swallows fly"',
        ):
            self.console.print(f"  {line}", soft_wrap=True, highlight=False)


async def _interrupted_by_signals() -> None:
    """Has signals that would end this process at once act as Ctrl-C, which cleans up."""
    import trio

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGHUP) as signals:
        async for _ in signals:
            raise KeyboardInterrupt


def _processes_table(mesh: DemoMesh, manifest: Manifest) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("process", "layers", "state"):
        table.add_column(name, style="bold" if name == "process" else "")
    layers = ["", *(str(shard.layers) for shard in manifest.shards)]
    for process, held in zip(mesh.processes, layers, strict=True):
        is_ready = process.state == "ready"
        table.add_row(
            process.name,
            held,
            f"[green]✓ {process.state}[/green]" if is_ready else f"[yellow]{process.state}",
        )
    return table
