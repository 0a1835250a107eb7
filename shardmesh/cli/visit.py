"""What all commands have in common that visit a mesh for a while: options, and a client of it."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shardmesh.cli.admission import client_admission
from shardmesh.cli.config_file import config_option
from shardmesh.cli.options import (
    Command,
    bootstrap_option,
    cache_dir,
    cluster_option,
)

if TYPE_CHECKING:
    from shardmesh.coordinator.client import Client
    from shardmesh.swarm.admission import Admission

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Visit:
    """Which mesh a command visits, and with whose secret."""

    bootstraps: tuple[str, ...]
    cluster: str
    admission: Admission
    shards_dir: Path

    def run(
        self,
        use: Callable[[Client], Awaitable[Result]],
        *,
        identity_file: Path | None = None,
        audit_rate: float = 0.0,
    ) -> Result:
        """Joins the mesh for as long as `use` takes; raises what `open_client` and `use` raise.

        Logs nothing but warnings, and those to standard error.
        """
        import trio

        from shardmesh.coordinator.client import open_client
        from shardmesh.logs import configure_logging
        from shardmesh.settling import settle_memory
        from shardmesh.swarm.identity import load_identity

        configure_logging("pretty", verbosity=-1, stream=sys.stderr)

        async def visit() -> Result:
            async with open_client(
                bootstraps=self.bootstraps,
                cluster=self.cluster,
                admission=self.admission,
                shards_dir=self.shards_dir,
                cache_dir=cache_dir(),
                identity=load_identity(identity_file) if identity_file else None,
                audit_rate=audit_rate,
            ) as client:
                settle_memory()
                return await use(client)

        return trio.run(visit)


def visit_options(command: Command) -> Command:
    """--bootstrap, --cluster, --config and those of admission, all as `visit`.

    `shards_dir_option` may stand above it, where the files of this machine are of use.
    """

    @functools.wraps(command)
    def visiting(
        *,
        bootstrap: tuple[str, ...],
        cluster: str,
        admission: Admission,
        shards_dir: Path = Path(),
        **others: Any,
    ) -> Any:
        return command(visit=Visit(bootstrap, cluster, admission, shards_dir), **others)

    with_options = config_option(client_admission(visiting))
    return bootstrap_option(cluster_option(with_options))  # type: ignore[return-value]
