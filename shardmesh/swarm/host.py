"""A node on the network: libp2p over TCP, secured by Noise, multiplexed by Yamux, nothing else.

An address without a peer id, like /ip4/127.0.0.1/tcp/51820, can be dialed: the handshake tells who
answered, and everything after it speaks to that peer id.  It is trust on first use; give the peer
id where it is known.
"""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio
from libp2p.abc import IRawConnection
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.exceptions import StreamFailure
from libp2p.identity.identify import identify
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from multiaddr import Multiaddr

from shardmesh.errors import (
    InputError,
    RefusedError,
    ShardmeshError,
    carried_past,
)
from shardmesh.swarm.addresses import (
    check_port,
    listen_address,
    parse_address,
    port_taken,
    relay_of,
    with_peer_id,
)
from shardmesh.swarm.admission import PUBLIC, Admission
from shardmesh.swarm.connections import ConnectionEvent, ConnectionWatch, remote_host
from shardmesh.swarm.failures import dial_reason, no_stream, unreachable
from shardmesh.swarm.identity import Identity
from shardmesh.swarm.noise import NotAdmitted
from shardmesh.swarm.relay import call, relayed_connection
from shardmesh.swarm.serving import Handler, Serving
from shardmesh.swarm.streams import ByteStream, Libp2pStream, receive_message, send_message
from shardmesh.swarm.transport import MeshHost, MeshSwarm, new_libp2p_host
from shardmesh.wire.limits import (
    HANDSHAKE_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    KNOWN_NODES_MAX,
    PING_INTERVAL_S,
    STREAM_OPEN_TIMEOUT_S,
)
from shardmesh.wire.relay import RELAYED_PROTOCOL

__all__ = ["ByteStream", "ConnectionEvent", "Handler", "Host", "open_host"]

_DIRECT = re.compile(r"/ip[46]/([0-9a-fA-F.:]+)/tcp/\d+(/p2p/\w+)?$")
_id_of = functools.lru_cache(KNOWN_NODES_MAX)(ID.from_base58)
"""The same few nodes are meant again and again, and reading a peer id takes long."""

_KNOWN_FOREVER_S = 365 * 24 * 3600
_LEAVE_TIMEOUT_S = 1.0
_log = logging.getLogger(__name__)


class Host:
    """A libp2p host; made by `open_host`.  Raises only ShardmeshErrors."""

    def __init__(
        self,
        libp2p: MeshHost,
        admission: Admission,
        watch: ConnectionWatch,
        nursery: trio.Nursery,
    ) -> None:
        self.libp2p = libp2p
        self.admission = admission
        self.peer_id = str(libp2p.get_id())
        self._swarm: MeshSwarm = libp2p.get_network()  # type: ignore[assignment]
        self._watch = watch
        self._nursery = nursery
        self._serving = Serving(libp2p, nursery)
        self._announced: tuple[str, ...] = ()
        self._circuits: tuple[str, ...] = ()
        self._relays: set[str] = set()
        watch.listen_to_events(self._forget_stranger)
        self._swarm.call = self._call
        libp2p.announced = self.addresses
        self.serve(RELAYED_PROTOCOL, self._serve_relayed, lasting=True)

    def addresses(self) -> list[str]:
        """Where others reach this node, with its peer id: what is announced.

        First what the person running it said, then its own, loopback last, then through relays.
        """
        direct = [] if self._swarm.is_hidden else self.direct_addresses()
        return [*direct, *(with_peer_id(text, self.peer_id) for text in self._circuits)]

    def direct_addresses(self) -> list[str]:
        """Those of `addresses` that need no relay, even where they are not announced."""
        own = [str(address) for address in self.libp2p.own_addrs()]
        said = [with_peer_id(text, self.peer_id) for text in self._announced]
        return list(dict.fromkeys([*said, *own]))

    def own_ports(self) -> list[int]:
        """The ports of `direct_addresses`, the one that is listened on first."""
        listening = [str(address) for address in self.libp2p.get_transport_addrs()]
        texts = [*listening, *self._announced]
        return list(dict.fromkeys(int(text.split("/")[4]) for text in texts))

    def announce_as(self, addresses: Sequence[str]) -> None:
        """Announces these too, which only a person can know of: a router forwards them."""
        self._announced = tuple(addresses)

    def hide(self) -> None:
        """From now on behaves as if behind NAT: nobody can connect but through a relay."""
        self._swarm.is_hidden = True

    def come_through(self, relays: set[str], addresses: Sequence[str]) -> bool:
        """Takes calls from these relays only, and announces these addresses through them.

        Says whether the addresses are others than before.
        """
        self._relays = relays
        before, self._circuits = self._circuits, tuple(addresses)
        return before != self._circuits

    def observed_host(self, peer_id: str) -> str | None:
        """The IP address that a node is seen at; None if it is only connected through a relay."""
        conns = self._swarm.get_connections(_id_of(peer_id))
        return next((h for c in conns if not c.is_closed and (h := remote_host(c))), None)

    def is_relayed(self, peer_id: str) -> bool:
        """Whether all connections with a node go through a relay."""
        return peer_id in self.connected() and self.observed_host(peer_id) is None

    def known_addresses(self, peer_id: str) -> list[str]:
        """Where a node was reached or said to be."""
        try:
            found = self.libp2p.get_peerstore().addrs(_id_of(peer_id))
        except PeerStoreError:
            return []
        return [str(address) for address in found]

    async def probe(self, host: str, port: int, peer_id: str) -> bool:
        """Whether a new connection there is answered by that node; it is not kept."""
        try:
            await self._swarm.probe(listen_address(host, port), _id_of(peer_id))
        except Exception as error:  # noqa: BLE001 - whatever a stranger's bytes provoke
            _log.debug("%s does not answer at %s port %d: %s", peer_id, host, port, error)
            return False
        return True

    def connected(self) -> list[str]:
        """The peer ids of all nodes that a live connection exists with."""
        return [
            str(peer_id)
            for peer_id, conns in self._swarm.get_connections_map().items()
            if any(not conn.is_closed for conn in conns)
        ]

    def on_connection(self, listener: Callable[[ConnectionEvent], None]) -> None:
        """Calls the listener whenever a connection is established or closed."""
        self._watch.listen_to_events(listener)

    def on_forgotten(self, listener: Callable[[str], None]) -> None:
        """Calls the listener with each peer id that proved unreachable or left as a stranger."""
        self._swarm.on_forgotten.append(lambda peer_id: listener(str(peer_id)))

    def keep_connections(self, wanted: Callable[[str], bool]) -> None:
        """Connections with a node for which `wanted(peer_id)` holds are not closed when idle."""
        self._watch.wanted = wanted

    def _forget_stranger(self, event: ConnectionEvent) -> None:
        """Clients come and go; what is remembered of them would be named to others as a node."""
        gone = event.kind == "closed" and event.peer_id not in self.connected()
        if gone and not self._watch.wanted(event.peer_id):
            self._swarm.forget(_id_of(event.peer_id))

    def learn(self, peer_id: str, addresses: Sequence[str]) -> None:
        """Remembers where a node is said to be, so that streams to it can be opened.

        Addresses that cannot be dialed are left out: they are a stranger's word.
        """
        store = self.libp2p.get_peerstore()
        node = _id_of(peer_id)
        if node not in store.peer_ids() and len(store.peer_ids()) >= KNOWN_NODES_MAX:
            return
        found = []
        for text in addresses:
            try:
                found.append(parse_address(text)[0])
            except InputError as error:
                _log.debug("an address of %s is left out: %s", peer_id, error)
        store.clear_addrs(node)
        store.add_addrs(node, found, _KNOWN_FOREVER_S)

    def hosts_of(self, peer_id: str) -> list[str]:
        """IP addresses of a node: those of live connections with it, then those it is said to have.

        Names, and addresses of a relay in between, are left out.
        """
        known = self.libp2p.get_peerstore()
        node = _id_of(peer_id)
        told = [str(a) for a in known.addrs(node)] if node in known.peer_ids() else []
        found = [_DIRECT.match(text) for text in [*self._watch.addresses_of(peer_id), *told]]
        return list(dict.fromkeys(match[1] for match in found if match))

    # -- asking --------------------------------------------------------------------------------

    async def connect(self, addresses: Sequence[str], timeout_s: float) -> str:
        """Connects with the node at these addresses and gives its peer id.

        Each address may lack the peer id.  Raises UnreachableError (the moment's) if none answers
        in time, RefusedError (theirs) if this node is not admitted, InputError (theirs) for what
        is no address.
        """
        targets = [parse_address(text) for text in addresses]
        connected = self.connected()
        for address, named in targets:
            peer_id = named or self._watch.peer_at(str(address))
            if peer_id is not None and peer_id in connected:
                return peer_id
        try:
            with trio.fail_after(timeout_s):
                conn = await self._swarm.dial_first(
                    [(address, _id_of(p) if p else None) for address, p in targets]
                )
        except NotAdmitted as error:
            raise error.refusal from error
        except SwarmException as error:
            raise unreachable(", ".join(addresses), dial_reason(error, addresses)) from error
        except trio.TooSlowError as error:
            raise unreachable(", ".join(addresses), f"no answer in {timeout_s:g} s") from error
        remote = conn.muxed_conn.peer_id
        answered = [a for a, p in targets if p is None or p == str(remote)]
        self.libp2p.get_peerstore().add_addrs(remote, answered, _KNOWN_FOREVER_S)
        return str(remote)

    async def disconnect(self, peer_id: str, cause: str) -> None:
        """Closes all connections with a node."""
        conns = self._swarm.get_connections(_id_of(peer_id))
        await self._watch.close(conns, cause)

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float = STREAM_OPEN_TIMEOUT_S
    ) -> ByteStream:
        """Opens a stream to a node that is connected or whose addresses are known.

        Raises UnreachableError (the moment's), or RefusedError (theirs) if the node does not
        speak the protocol.  A cancellation leaves nothing open.
        """
        opening = _Opening()
        self._nursery.start_soon(self._open, peer_id, protocol, opening)
        try:
            with trio.fail_after(timeout_s):
                await opening.done.wait()
        except trio.TooSlowError as error:
            raise unreachable(peer_id, f"no answer in {timeout_s:g} s") from error
        finally:
            opening.abandoned = not opening.done.is_set()
        if opening.stream is None:
            raise opening.error or unreachable(peer_id, "no stream")
        return opening.stream

    async def request(
        self,
        peer_id: str,
        protocol: str,
        payload: bytes,
        *,
        timeout_s: float,
        response_bytes_max: int,
        silence_timeout_s: float = math.inf,
    ) -> bytes:
        """Sends one message on a stream of its own and gives the answer.

        A long answer may take its time, as long as more of it comes: `silence_timeout_s`.
        Raises UnreachableError (the moment's), RefusedError (theirs) if the protocol is not
        spoken, ProtocolError (theirs) for an answer that is too long or cut off.  A cancellation
        resets the stream, which the other side sees.
        """
        with trio.move_on_after(timeout_s):
            stream = await self.open_stream(peer_id, protocol, min(timeout_s, silence_timeout_s))
            try:
                await send_message(stream, payload)
                answer = await receive_message(
                    stream, response_bytes_max, silence_timeout_s=silence_timeout_s
                )
                await stream.aclose()
                return answer
            finally:
                stream.abort()  # nothing happens if it is closed
        raise unreachable(peer_id, f"no answer in {timeout_s:g} s")

    async def _open(self, peer_id: str, protocol: str, opening: _Opening) -> None:
        """Runs in the host's own nursery: cancelled half-way it would ruin the connection."""
        try:
            stream = await self.libp2p.new_stream(_id_of(peer_id), [TProtocol(protocol)])
        except NotAdmitted as error:
            opening.error = error.refusal
        except StreamFailure as error:
            opening.error = no_stream(peer_id, protocol, error)
        except (BaseLibp2pError, OSError, ValueError, trio.TooSlowError) as error:
            opening.error = unreachable(peer_id, str(error))
        else:
            wrapped = Libp2pStream(stream, self._nursery)
            if opening.abandoned:
                wrapped.abort()
            opening.stream = wrapped
        finally:
            opening.done.set()

    async def _call(self, address: Multiaddr, peer_id: ID) -> IRawConnection:
        """Connects with the relay of a circuit address, unless it is, and calls the node there."""
        try:
            relay_id = await self.connect([relay_of(address)], HANDSHAKE_TIMEOUT_S)
        except RefusedError as error:
            raise NotAdmitted(error) from error
        return await call(self, relay_id, str(peer_id))

    async def _serve_relayed(self, stream: ByteStream, relay_id: str) -> None:
        """Serves a connection that a relay brings, if this node has a place there."""
        if relay_id not in self._relays:
            raise RefusedError("a call through a relay that this node has no place on")
        raw = relayed_connection(stream, relay_id, is_dialer=False)
        await self._swarm.serve_raw(raw, raw.get_transport_addresses()[0])

    def serve(
        self, protocol: str, handler: Handler, *, busy: bytes | None = None, lasting: bool = False
    ) -> None:
        """Serves a protocol from now on; see `Serving.serve`."""
        self._serving.serve(protocol, handler, busy=busy, lasting=lasting)


class _Opening:
    """What `open_stream` waits for."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.stream: Libp2pStream | None = None
        self.error: ShardmeshError | None = None
        self.abandoned = False


@asynccontextmanager
async def open_host(
    identity: Identity,
    *,
    listen_host: str | Sequence[str] = "0.0.0.0",
    port: int = 0,
    agent: str = "shardmesh",
    admission: Admission = PUBLIC,
    ping_interval_s: float = PING_INTERVAL_S,
    idle_timeout_s: float = IDLE_TIMEOUT_S,
) -> AsyncIterator[Host]:
    """A host that listens on TCP until the block is left, on one IP address or several.

    The port is the same on all of them; 0 picks one.

    Raises InputError (theirs) if the address or the port cannot be had.  `agent` is what others
    see in identify; it holds for the whole process.  `admission` says who may connect.
    """
    listen_hosts = [listen_host] if isinstance(listen_host, str) else list(listen_host)
    port = await check_port(listen_hosts, port)
    identify.AGENT_VERSION = agent
    libp2p = new_libp2p_host(identity, admission)
    swarm: MeshSwarm = libp2p.get_network()  # type: ignore[assignment]
    watch = ConnectionWatch(swarm, ping_interval_s, idle_timeout_s)
    addresses = [listen_address(host, port) for host in listen_hosts]
    with carried_past() as block:
        async with libp2p.run(listen_addrs=addresses), trio.open_nursery() as nursery:
            try:
                with block():
                    if len(libp2p.get_transport_addrs()) < len(addresses):
                        raise port_taken(listen_hosts[0], port, "it cannot be listened on")
                    swarm.widen_entrance()
                    nursery.start_soon(watch.run)
                    yield Host(libp2p, admission, watch, nursery)
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(_LEAVE_TIMEOUT_S):
                    await swarm.stop_listening()
                    await watch.close(swarm.get_connections(), "this node is leaving")
                nursery.cancel_scope.cancel()
