"""Finding the mesh on the LAN by its cluster's name: mDNS with DNS-SD (RFC 6762, RFC 6763).

Anybody on the LAN can answer, so what is found is an address to dial and nothing more: the
handshake proves who is there and, in a private mesh, the secret.  The cluster's name is not shown,
only a hash of it.

zeroconf runs asyncio in a thread of its own; nothing of it runs on the trio loop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import (
    InterfaceChoice,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)

from shardmesh.errors import ShardmeshError
from shardmesh.swarm.host import Host
from shardmesh.wire.defaults import DEFAULT_BOOTSTRAP
from shardmesh.wire.limits import (
    COMMAND_TIMEOUT_S,
    LAN_NODES_MAX,
    LAN_SEARCH_INTERVAL_S,
    LAN_SEARCH_TIMEOUT_S,
    RELAY_ADDRESSES_MAX,
)
from shardmesh.wire.peer_id import is_peer_id

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

_TYPE: Final = "_shardmesh._tcp.local."
_CLUSTER_KEY: Final = b"c"
_RESOLVE_TIMEOUT_MS: Final = 2000
_CLOSE_TIMEOUT_S: Final = 2.0


def cluster_tag(cluster: str) -> str:
    """What stands for a cluster's name on the LAN."""
    return hashlib.sha256(b"shardmesh lan 1\0" + cluster.encode()).hexdigest()[:32]


def is_default(bootstraps: Sequence[str]) -> bool:
    """Whether nobody said where the mesh is."""
    return tuple(bootstraps) == (DEFAULT_BOOTSTRAP,)


@dataclasses.dataclass(frozen=True)
class LanNode:
    """A node that says that it belongs to the cluster; nothing of it is proven."""

    peer_id: str
    addresses: tuple[str, ...]


class Lan:
    """The nodes of one cluster that were heard of on the LAN; made by `open_lan`."""

    def __init__(self, cluster: str, own_peer_id: str) -> None:
        self._tag = cluster_tag(cluster).encode()
        self._own_peer_id = own_peer_id
        self._nodes: dict[str, LanNode] = {}
        self._changed = trio.Event()

    def nodes(self) -> list[LanNode]:
        return list(self._nodes.values())

    async def wait_changed(self) -> None:
        """Waits until one is heard of."""
        await self._changed.wait()

    def note(self, node: LanNode) -> None:
        """Takes in a node; those beyond LAN_NODES_MAX are left out."""
        if len(self._nodes) < LAN_NODES_MAX or node.peer_id in self._nodes:
            self._nodes[node.peer_id] = node
            self._changed.set()
            self._changed = trio.Event()

    def read(self, info: ServiceInfo) -> LanNode | None:
        """What an answer says, if it is of this cluster and another node."""
        peer_id = info.name.partition(".")[0]
        if info.properties.get(_CLUSTER_KEY) != self._tag or not is_peer_id(peer_id):
            return None
        if peer_id == self._own_peer_id or not info.port:
            return None
        texts = [text for text in info.parsed_addresses() if "%" not in text]
        addresses = tuple(
            f"/{'ip6' if ':' in text else 'ip4'}/{text}/tcp/{info.port}/p2p/{peer_id}"
            for text in texts[:RELAY_ADDRESSES_MAX]
        )
        return LanNode(peer_id, addresses) if addresses else None


@asynccontextmanager
async def open_lan(
    cluster: str,
    peer_id: str,
    listen_hosts: Sequence[str],
    *,
    shown_at: Sequence[str] = (),
    port: int = 0,
    searches: bool = False,
) -> AsyncIterator[Lan]:
    """Shows this node on the LAN (`shown_at`, IP addresses) and searches others, until the end.

    Only the networks of `listen_hosts` are used.  Where there is no multicast, nothing is found,
    which is said in the log.
    """
    lan = Lan(cluster, peer_id)
    zeroconf: Zeroconf | None = None
    try:
        zeroconf = await _in_thread(_start, listen_hosts)
    except (OSError, ZeroconfError) as error:
        _log.info("the LAN cannot be searched: %s", error)
    async with trio.open_nursery() as nursery:
        if zeroconf is not None:
            if shown_at and port:
                nursery.start_soon(_show, zeroconf, _service(cluster, peer_id, shown_at, port))
            if searches:
                _search(zeroconf, lan, trio.lowlevel.current_trio_token())
        try:
            yield lan
        finally:
            nursery.cancel_scope.cancel()
            if zeroconf is not None:
                with trio.CancelScope(shield=True), trio.move_on_after(_CLOSE_TIMEOUT_S):
                    await _in_thread(zeroconf.close)


@asynccontextmanager
async def open_lan_of(
    host: Host, cluster: str, listen_hosts: Sequence[str], *, searches: bool = False
) -> AsyncIterator[Lan]:
    """As `open_lan`, with a host's own port and addresses."""
    parts = [address.split("/") for address in host.direct_addresses()]
    shown_at = [p[2] for p in parts if p[1] in ("ip4", "ip6")]
    loopback_too = all(ipaddress.ip_address(h).is_loopback for h in listen_hosts)
    shown_at = [h for h in shown_at if loopback_too or not ipaddress.ip_address(h).is_loopback]
    async with open_lan(
        cluster,
        host.peer_id,
        listen_hosts,
        shown_at=list(dict.fromkeys(shown_at)),
        port=next(iter(host.own_ports()), 0),
        searches=searches,
    ) as lan:
        yield lan


async def _in_thread(work: Callable[..., Result], *arguments: Any) -> Result:
    """A cancellation leaves the thread to itself: zeroconf ends its own waiting."""
    run_sync: Any = trio.to_thread.run_sync  # the stubs lack this argument
    result: Result = await run_sync(work, *arguments, abandon_on_cancel=True)
    return result


def _start(listen_hosts: Sequence[str]) -> Zeroconf:
    hosts = [ipaddress.ip_address(host) for host in listen_hosts]
    if any(host.is_unspecified for host in hosts):
        return Zeroconf(interfaces=InterfaceChoice.All)
    return Zeroconf(interfaces=[str(host) for host in hosts])


def _service(cluster: str, peer_id: str, shown_at: Sequence[str], port: int) -> ServiceInfo:
    return ServiceInfo(
        _TYPE,
        f"{peer_id}.{_TYPE}",
        port=port,
        properties={_CLUSTER_KEY: cluster_tag(cluster)},
        parsed_addresses=list(shown_at),
        server=f"{peer_id}.local.",
    )


async def _show(zeroconf: Zeroconf, service: ServiceInfo) -> None:
    try:
        await _in_thread(zeroconf.register_service, service)
    except (OSError, ZeroconfError) as error:
        _log.info("this node is not shown on the LAN: %s", str(error) or type(error).__name__)


def _search(zeroconf: Zeroconf, lan: Lan, token: trio.lowlevel.TrioToken) -> None:
    def on_change(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        """Called in zeroconf's own thread, where it may wait."""
        if state_change is ServiceStateChange.Removed:
            return  # whether it is gone shows when it is dialed
        try:
            info = zeroconf.get_service_info(service_type, name, _RESOLVE_TIMEOUT_MS)
            node = lan.read(info) if info is not None else None
            if node is not None:
                token.run_sync_soon(lan.note, node)
        except trio.RunFinishedError:
            return  # the node is gone meanwhile
        except Exception as error:  # noqa: BLE001 - strangers answer anything; the thread must live
            _log.debug("an answer on the LAN could not be read: %s", error)

    ServiceBrowser(zeroconf, _TYPE, handlers=[on_change])


async def find_on_lan(cluster: str, timeout_s: float = LAN_SEARCH_TIMEOUT_S) -> list[LanNode]:
    """The nodes of a cluster that answer first, none if nobody does in time; for clients."""
    async with open_lan(cluster, "", ["0.0.0.0"], searches=True) as lan:
        with trio.move_on_after(timeout_s):
            await lan.wait_changed()
        return lan.nodes()


async def stay_joined(
    host: Host,
    lan: Lan,
    *,
    neighbours: Callable[[], list[str]],
    joined: Callable[[str], Awaitable[None]],
) -> None:
    """Connects with what the LAN shows whenever the node has no neighbours, for ever."""
    while True:
        for node in lan.nodes():
            if neighbours():
                break
            try:
                peer_id = await host.connect(node.addresses, COMMAND_TIMEOUT_S)
            except ShardmeshError as error:
                _log.info("[CONNECT] ✗ %s, found on the LAN: %s", node.peer_id, error)
                continue
            _log.info("[CONNECT] ✓ Found on the LAN: %s", peer_id)
            await joined(peer_id)
        with trio.move_on_after(LAN_SEARCH_INTERVAL_S):
            await lan.wait_changed()
