"""Multiaddresses: which ones a node can be reached at, and reading those that people type."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

import psutil
import trio
from multiaddr import Multiaddr
from multiaddr.exceptions import MultiaddrError

from shardmesh.errors import InputError
from shardmesh.wire.limits import TEXT_BYTES_MAX
from shardmesh.wire.peer_id import is_peer_id


def parse_address(text: str) -> tuple[Multiaddr, str | None]:
    """A multiaddress without its `/p2p/...` end, and the peer id of that end if there is one.

    Raises InputError (theirs) if it is none that can be dialed.
    """
    next_step = "Write it like /ip4/192.168.1.20/tcp/51820, with /p2p/<peer id> behind if known."
    transport, _, peer_id = text.strip().partition("/p2p/")
    if len(text) > TEXT_BYTES_MAX or (peer_id and not is_peer_id(peer_id)):
        raise InputError(f"{text[:200]!r} has no valid peer id", next_step=next_step)
    try:
        address = Multiaddr(transport)
        names = [protocol.name for protocol in address.protocols()]
    except (MultiaddrError, ValueError, LookupError) as error:
        raise InputError(f"{text[:200]!r} is no multiaddress", next_step=next_step) from error
    if len(names) != 2 or names[0] not in _HOSTS or names[1] != "tcp":
        raise InputError(f"{text[:200]!r} is no TCP address", next_step=next_step)
    return address, peer_id or None


_HOSTS = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})


def reachable_addresses(listening: Iterable[Multiaddr]) -> list[Multiaddr]:
    """Where others reach a node that listens there: 0.0.0.0 becomes the machine's own addresses.

    Loopback addresses come last: they mean something on this machine only.
    """
    found: list[tuple[bool, str]] = []
    for address in listening:
        port = address.value_for_protocol("tcp")
        kind = "ip6" if "ip6" in str(address) else "ip4"
        host = str(address.value_for_protocol(kind))
        hosts = _own_hosts(kind) if ipaddress.ip_address(host).is_unspecified else [host]
        found += [
            (ipaddress.ip_address(own).is_loopback, f"/{kind}/{own}/tcp/{port}") for own in hosts
        ]
    return [Multiaddr(text) for _, text in sorted(set(found))]


def _own_hosts(kind: str) -> list[str]:
    family = socket.AF_INET6 if kind == "ip6" else socket.AF_INET
    return [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == family and "%" not in entry.address  # link-local ones need a scope
    ]


def listen_address(host: str, port: int) -> Multiaddr:
    """The multiaddress of an IP address and a port; InputError (theirs) if it is no IP address."""
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        raise InputError(
            f"{host!r} is no IP address to listen on",
            next_step="Use 0.0.0.0 for all networks of this machine or 127.0.0.1 for itself only.",
        ) from error
    return Multiaddr(f"/ip{version}/{host}/tcp/{port}")


async def check_port(host: str, port: int) -> None:
    """Tries the port: libp2p shares it silently with another process of the same user."""
    address = listen_address(host, port)
    family = trio.socket.AF_INET6 if "ip6" in str(address) else trio.socket.AF_INET
    with trio.socket.socket(family, trio.socket.SOCK_STREAM) as probe:
        probe.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        try:
            await probe.bind((host, port))
            probe.listen(1)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise port_taken(host, port, reason) from error


def port_taken(host: str, port: int, reason: str) -> InputError:
    """What to tell a person whose port is not free."""
    return InputError(
        f"port {port} on {host} is not free: {reason}",
        code="PORT_TAKEN",
        next_step="End the process that uses it, or choose another one with --port.",
    )


def with_peer_id(address: str, peer_id: str) -> str:
    """The address with the peer id behind it, as others need it to be sure whom they reach."""
    return f"{address.partition('/p2p/')[0]}/p2p/{peer_id}"
