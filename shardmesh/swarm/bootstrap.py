"""The bootstrap: the entry point of a mesh, which holds no model."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

import trio

from shardmesh import __version__
from shardmesh.settling import settle_memory
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.cluster_files import file_name_of
from shardmesh.swarm.commands import CommandHandler, serve_commands
from shardmesh.swarm.dht import open_dht
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host, open_host
from shardmesh.swarm.identity import Identity, load_identity
from shardmesh.swarm.lan import open_lan_of
from shardmesh.swarm.membership import Membership
from shardmesh.swarm.reach import ReachOptions, serve_dial_back
from shardmesh.swarm.relay import Relay
from shardmesh.swarm.state_file import locked_file


@dataclasses.dataclass(frozen=True, kw_only=True)
class BootstrapSettings:
    """How to run a bootstrap."""

    listen_hosts: tuple[str, ...]
    port: int
    reach: ReachOptions
    cluster: str
    admission: Admission
    secret_path: Path  # where the secret is kept, for those who must not see it here
    shows_secret: bool  # whether the lines for others may hold the secret itself
    identity_file: Path
    state_dir: Path
    join: Sequence[str] = ()  # other bootstraps of the same mesh


async def run_bootstrap(settings: BootstrapSettings, logger: logging.Logger) -> None:
    """Serves DHT, directory and commands until SIGINT or SIGTERM.

    Raises InputError (theirs) for a port that is taken, and for an identity that is broken or that
    another bootstrap of this cluster has.
    """
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve, settings, logger)
            async for number in signals:
                logger.info("%s: leaving", signal.Signals(number).name)
                nursery.cancel_scope.cancel()
                break


async def _serve(settings: BootstrapSettings, logger: logging.Logger) -> None:
    identity = load_identity(settings.identity_file)
    logger.info("Peer ID: %s", identity.peer_id)
    lock = settings.state_dir / f"{file_name_of(settings.cluster)}.{identity.peer_id[-8:]}.lock"
    with locked_file(lock, settings.identity_file):
        await _take_part(settings, identity, logger)


async def _take_part(
    settings: BootstrapSettings, identity: Identity, logger: logging.Logger
) -> None:
    async with (
        open_host(
            identity,
            listen_host=settings.listen_hosts,
            port=settings.port,
            agent=f"bootstrap/{settings.cluster}",
            admission=settings.admission,
        ) as host,
        open_dht(host, cluster=settings.cluster) as dht,
    ):
        _keep_secret(settings.admission)
        directory = Directory(settings.cluster)
        membership = Membership(
            host,
            dht,
            directory,
            bootstraps=settings.join,
            signer=identity,
            state_dir=settings.state_dir,
            logger=logger,
        )
        host.announce_as(settings.reach.announced)
        serve_dial_back(host)
        relay = Relay(host) if settings.reach.offers_relay else None
        if relay is not None:
            relay.serve()
        serve_commands(host, _BootstrapCommands(host, directory, relay).handlers())
        _say_how_to_join(host, settings, logger)
        async with contextlib.AsyncExitStack() as stack:
            if settings.reach.mdns:
                lan = open_lan_of(host, settings.cluster, settings.listen_hosts)
                await stack.enter_async_context(lan)
            await membership.run()


def _keep_secret(admission: Admission) -> None:
    """Others have it from here, so nobody else has to prove it first; StorageError (ours)."""
    if admission.files is not None and admission.secret is not None:
        admission.files.keep(admission.secret)


def _say_how_to_join(host: Host, settings: BootstrapSettings, logger: logging.Logger) -> None:
    addresses = host.addresses()
    for address in addresses:
        logger.info("[LISTEN] Listening on: %s", address)
    secret = settings.admission.secret
    if secret is None:
        logger.warning(
            "This mesh is public: whoever reaches it can join, see who serves what, send prompts, "
            "and read those of others with a stage of their own"
        )
    logger.info("Start listeners with one of these lines:")
    begin = f"  shardmesh listen --cluster {shlex.quote(settings.cluster)} --bootstrap"
    for line in (f"{begin} {address}" for address in addresses):
        if secret is None:
            logger.info("%s --public", line)
        elif settings.shows_secret:  # past the log: what is kept of it must not hold the secret
            print(f"{line} --secret {secret.text()}", flush=True)
        else:
            logger.info("%s --secret-file %s", line, shlex.quote(str(settings.secret_path)))
    if secret is not None:
        logger.info(
            "The cluster is private. Its secret is kept in %s; who has it is a member",
            settings.secret_path,
        )
    settle_memory()
    logger.info("✅ Bootstrap node started! Waiting for connections...")


class _BootstrapCommands:
    """What a bootstrap answers over /json-message/1.0."""

    def __init__(self, host: Host, directory: Directory, relay: Relay | None) -> None:
        self._host = host
        self._relay = relay
        self._directory = directory
        self._started_s = trio.current_time()
        self._n_requests = 0

    def handlers(self) -> dict[str, CommandHandler]:
        return {
            "GET_CAPABILITIES": self.get_capabilities,
            "GET_METRICS": self.get_metrics,
        }

    async def get_capabilities(self, params: object) -> object:
        self._n_requests += 1
        return {
            "role": "bootstrap",
            "version": __version__,
            "peer_id": self._host.peer_id,
            "cluster": self._directory.cluster,
            "addresses": self._host.addresses(),
        }

    async def get_metrics(self, params: object) -> object:
        self._n_requests += 1
        return {
            "uptime_s": round(trio.current_time() - self._started_s, 3),
            "n_requests": self._n_requests,
            "n_connected_nodes": len(self._host.connected()),
            "n_listeners": len(self._directory.all()),
            "n_nodes_refused": dict(self._host.admission.n_refused),
            "n_announcements_refused": dict(self._directory.n_refused),
            "n_relay_places": self._relay.n_reservations if self._relay else 0,
            "n_relayed_connections": self._relay.n_circuits if self._relay else 0,
        }
