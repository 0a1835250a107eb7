"""Multiaddresses: which ones a node can be reached at, and reading those that people type."""

from __future__ import annotations

import errno
import functools
import ipaddress
import socket
from collections.abc import Iterable, Sequence

import psutil
import trio
from multiaddr import Multiaddr
from multiaddr.exceptions import MultiaddrError

from shardmesh.errors import InputError
from shardmesh.wire.limits import ANNOUNCEMENT_ADDRESSES_MAX, TEXT_BYTES_MAX
from shardmesh.wire.peer_id import is_peer_id

ADDRESSES_READ_KEPT = 1024
"""Each request names the same addresses, and reading one takes as long as sending a frame."""


@functools.lru_cache(ADDRESSES_READ_KEPT)
def parse_address(text: str) -> tuple[Multiaddr, str | None]:
    """A multiaddress without its `/p2p/...` end, and the peer id of that end if there is one.

    It may lead through one relay, which is named with its peer id, and so is then the node.
    Raises InputError (theirs) if it is none that can be dialed.
    """
    next_step = "Write it like /ip4/192.168.1.20/tcp/51820, with /p2p/<peer id> behind if known."
    text = text.strip()
    relay, circuit, end = text.rpartition(_CIRCUIT)
    transport, _, peer_id = (end if circuit else text).partition("/p2p/")
    relay_host, _, relay_id = relay.partition("/p2p/")
    ids = [relay_id] * bool(circuit) + [peer_id] * bool(peer_id)
    if len(text) > TEXT_BYTES_MAX or not all(is_peer_id(i) for i in ids) or (circuit and transport):
        raise InputError(f"{text[:200]!r} has no valid peer id", next_step=next_step)
    try:
        address = Multiaddr(relay_host if circuit else transport)
        names = [protocol.name for protocol in address.protocols()]
    except (MultiaddrError, ValueError, LookupError) as error:
        raise InputError(f"{text[:200]!r} is no multiaddress", next_step=next_step) from error
    if len(names) != 2 or names[0] not in _HOSTS or names[1] != "tcp":
        raise InputError(f"{text[:200]!r} is no TCP address", next_step=next_step)
    if circuit:
        address = Multiaddr(f"{address}/p2p/{relay_id}{_CIRCUIT}")
    return address, peer_id or None


_CIRCUIT = "/p2p-circuit"


def is_circuit(address: Multiaddr | str) -> bool:
    """Whether the address leads through a relay."""
    return _CIRCUIT in str(address)


def relay_of(address: Multiaddr) -> str:
    """The address of the relay that a circuit address leads through, with its peer id."""
    return str(address).partition(_CIRCUIT)[0]


def circuit_addresses(relay_id: str, known: Iterable[str], told: Iterable[str]) -> tuple[str, ...]:
    """Addresses through a relay, best first, without the node's own peer id; some at most.

    Where this node reached the relay (`known`) it certainly is; what the relay tells of itself
    counts too, its loopback only if it is on this machine.  What is no address is left out.
    """
    found: list[str] = []
    for text in (*known, *told):
        try:
            address, peer_id = parse_address(text)
        except InputError:
            continue
        if peer_id in (None, relay_id) and not is_circuit(address):
            found.append(str(address))
    is_near = any(is_loopback(text) for text in known)
    kept = [text for text in dict.fromkeys(found) if is_near or not is_loopback(text)]
    return tuple(f"{a}/p2p/{relay_id}{_CIRCUIT}" for a in kept[:CIRCUITS_PER_RELAY_MAX])


CIRCUITS_PER_RELAY_MAX = 3
"""Addresses through one relay; an announcement has room for 16 of all kinds."""


def is_loopback(address: str) -> bool:
    """Whether the address means the machine itself."""
    parts = address.split("/")
    try:
        return ipaddress.ip_address(parts[2]).is_loopback
    except (IndexError, ValueError):
        return False


_HOSTS = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})


def told_addresses(addresses: Sequence[str]) -> tuple[str, ...]:
    """Those that an announcement has room for: all that lead through relays, then direct ones.

    A machine may have any number of its own, and be reached at none of them.
    """
    circuits = [text for text in addresses if is_circuit(text)][:ANNOUNCEMENT_ADDRESSES_MAX]
    direct = [text for text in addresses if not is_circuit(text)]
    return (*direct[: ANNOUNCEMENT_ADDRESSES_MAX - len(circuits)], *circuits)


def reachable_addresses(listening: Iterable[Multiaddr]) -> list[Multiaddr]:
    """Where others reach a node that listens there: 0.0.0.0 becomes the machine's own addresses.

    First the one that it goes out with: others may be of networks inside of it, and of many of them
    not all are told.  Loopback addresses come last: they mean something on this machine only.
    """
    found: list[tuple[bool, bool, str]] = []
    for address in listening:
        port = address.value_for_protocol("tcp")
        kind = "ip6" if "ip6" in str(address) else "ip4"
        host = str(address.value_for_protocol(kind))
        hosts = _own_hosts(kind) if ipaddress.ip_address(host).is_unspecified else [host]
        outward = _outward_host(kind)
        found += [
            (ipaddress.ip_address(own).is_loopback, own != outward, f"/{kind}/{own}/tcp/{port}")
            for own in hosts
        ]
    return [Multiaddr(text) for _, _, text in sorted(set(found))]


_FAR_AWAY = {"ip4": "198.51.100.1", "ip6": "2001:db8::1"}
"""Addresses that are nobody's (RFC 5737, RFC 3849)."""


def _outward_host(kind: str) -> str:
    """The machine's address on the way to far networks; empty without such a way.

    Nothing is sent: to connect a datagram socket only looks the way up.
    """
    family = socket.AF_INET6 if kind == "ip6" else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_FAR_AWAY[kind], 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


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


async def check_port(hosts: Sequence[str], port: int) -> int:
    """Tries a port on all addresses: libp2p shares it silently with a process of the same user.

    Gives the port, which for 0 is one that is free on all of them.  InputError (theirs).
    """
    for host in hosts:
        family = trio.socket.AF_INET6 if ":" in host else trio.socket.AF_INET
        listen_address(host, port)  # says what is wrong with it
        with trio.socket.socket(family, trio.socket.SOCK_STREAM) as probe:
            probe.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
            try:
                await probe.bind((host, port))
                probe.listen(1)
                port = port or (probe.getsockname()[1] if len(hosts) > 1 else 0)
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise port_taken(host, port, reason, getattr(error, "errno", None)) from error
    return port


def default_hosts() -> tuple[str, ...]:
    """Where a node listens if nothing is said: all networks, IPv6 where the machine has it."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return ("0.0.0.0",)
    return ("0.0.0.0", "::")


def port_taken(host: str, port: int, reason: str, number: int | None = None) -> InputError:
    """What to tell a person whose port cannot be had; `number` is the system's errno."""
    if number == errno.EADDRNOTAVAIL:
        return InputError(
            f"{host} is no address of this machine",
            next_step="give --listen-addr an address that it has, or 0.0.0.0 for all of them",
        )
    if number == errno.EACCES:
        return InputError(
            f"port {port} on {host} may not be used by this user",
            code="PORT_TAKEN",
            next_step="choose one from 1024 on with --port",
        )
    return InputError(
        f"port {port} on {host} is not free: {reason}",
        code="PORT_TAKEN",
        next_step="End the process that uses it, or choose another one with --port.",
    )


def with_peer_id(address: str, peer_id: str) -> str:
    """The address with the peer id behind it, as others need it to be sure whom they reach."""
    return f"{parse_address(address)[0]}/p2p/{peer_id}"
