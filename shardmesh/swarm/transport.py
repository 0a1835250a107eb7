"""libp2p's swarm and host with the traps of version 0.8.1 taken out.

What is different from the library's own, each found by trying or by reading its source:

- A node is dialed at all its addresses, staggered, twice where that hangs, and never refused
  because an earlier attempt failed (the library takes one address and then refuses it for 60 s).
- An address without a peer id can be dialed: the Noise handshake (XX) tells who is there.  The
  library insists on knowing beforehand, although its handshake takes None for "whoever it is".
- An inbound connection gives its place back when it closes (the library keeps it for ever and is
  deaf after `max_connections` of them).
- More than 128 may wait to be accepted.
- An exception in a stream handler or in Yamux ends that stream or connection, not the host.
- Cancelling a reader or a writer does not ruin the connection under it.
- Nobody is dialed unasked (the library's auto-connector dials whatever it has ever heard of).
- Who is no member is turned away in the handshake (swarm/noise.py), before it can ask anything.
- The other side's IPv6 address is known (the library only understands pairs of IPv4).
- A node is dialed through a relay where it says so, after its own addresses (swarm/relay.py).
- A node that cannot be reached is forgotten (the library names it to everybody who asks the DHT,
  for hours, and a mesh that many have visited and left is then full of ghosts).
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream, IRawConnection, ISecureConn
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as new_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore, PeerStoreError
from libp2p.protocol_muxer.exceptions import MultiselectError
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX_PROTOCOL
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.transport.tcp.tcp import TCP, TCPListener
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from shardmesh.anteroom import Anteroom
from shardmesh.swarm.addresses import is_circuit, reachable_addresses
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.identity import Identity
from shardmesh.swarm.noise import AdmittingNoise, NotAdmitted
from shardmesh.wire.limits import (
    CONNECTIONS_MAX,
    CONNECTIONS_PER_NODE_MAX,
    DIAL_ADDRESSES_MAX,
    DIAL_STAGGER_S,
    HANDSHAKE_TIMEOUT_S,
    HANDSHAKES_MAX,
    STREAM_OPEN_TIMEOUT_S,
)

_DIAL_AGAIN_S = 1.5  # longer than a handshake takes over 200 ms without losses
_log = logging.getLogger(__name__)

logging.getLogger("libp2p").propagate = True
"""Its import takes its loggers out of the process's own set-up, to standard error; back again."""


Call = Callable[[Multiaddr, ID], Awaitable[IRawConnection]]
"""Brings up a connection through the relay of a circuit address, without its handshake."""


class QuietAutoConnector(AutoConnector):
    """Dials nobody."""

    async def maybe_connect(self) -> None:
        await trio.lowlevel.checkpoint()


class MeshSwarm(Swarm):
    """The library's swarm with the differences listed above."""

    def harden(self) -> None:
        """To be called once, before the swarm runs."""
        self.auto_connector = QuietAutoConnector(self)
        self.anteroom = Anteroom(HANDSHAKES_MAX)
        self.on_forgotten: list[Callable[[ID], None]] = []
        self.call: Call | None = None
        self.is_hidden = False  # takes no connections but through a relay, as if behind NAT

    def forget(self, peer_id: ID) -> None:
        """Drops what is known of a node and tells whoever listens."""
        if self.peerstore.has_peer(peer_id):
            self.peerstore.clear_peerdata(peer_id)
        for listener in self.on_forgotten:
            listener(peer_id)

    def widen_entrance(self) -> None:
        """Lets as many wait to be accepted as may wait for their handshake; once it listens.

        Beyond the library's 128 the system would let newcomers hang without a word.
        """
        for listener in self.listeners.values():
            for socket_listener in cast(TCPListener, listener).listeners:
                socket_listener.socket.listen(HANDSHAKES_MAX)

    async def stop_listening(self) -> None:
        """Frees the port; the library forgets to when its service is stopped by a cancellation."""
        for listener in list(self.listeners.values()):
            await listener.close()

    # -- outbound ------------------------------------------------------------------------------

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """Connects with a known node at one of its known addresses."""
        while (dial := self._ongoing_dials.get(peer_id)) is not None:
            await dial.wait()  # bounded, because every dial is
        existing = [conn for conn in self.get_connections(peer_id) if not conn.is_closed]
        if existing:
            return existing
        try:
            addresses = self.peerstore.addrs(peer_id)
        except PeerStoreError as error:
            raise SwarmException(f"no known addresses of {peer_id}") from error
        self._ongoing_dials[peer_id] = trio.Event()
        try:
            return [await self.dial_first([(address, peer_id) for address in addresses])]
        except SwarmException:
            self.forget(peer_id)
            raise
        finally:
            self._ongoing_dials.pop(peer_id).set()

    async def dial_first(self, targets: Sequence[tuple[Multiaddr, ID | None]]) -> INetConn:
        """Connects with the target that answers first; each has a small head start on the next.

        Those through a relay come last.  Where an attempt hangs, a second one begins from anew: a
        connection whose first packets were lost waits for seconds before it sends them again.

        Raises SwarmException with the reason of each if none answers, NotAdmitted if one answered
        and did not want this node.
        """
        found: list[INetConn] = []
        reasons: list[str] = []
        refusals: list[NotAdmitted] = []
        failures: list[trio.Event] = []

        async def attempt(address: Multiaddr, peer_id: ID | None, failed: trio.Event) -> None:
            try:
                conn = await self._dial_one(address, peer_id)
            except Exception as error:  # noqa: BLE001 - whatever a stranger's bytes provoke
                reasons.append(f"{address}: {_reason(error)}")
                if isinstance(error, NotAdmitted):
                    refusals.append(error)
                failed.set()
            else:
                found.append(conn)
                nursery.cancel_scope.cancel()

        first = sorted(targets, key=lambda target: is_circuit(target[0]))[:DIAL_ADDRESSES_MAX]
        async with trio.open_nursery() as nursery:
            for address, peer_id in first:
                failures.append(trio.Event())
                nursery.start_soon(attempt, address, peer_id, failures[-1])
                with trio.move_on_after(DIAL_STAGGER_S):
                    await failures[-1].wait()
            with trio.move_on_after(_DIAL_AGAIN_S):
                for failed in failures:
                    await failed.wait()
            for (address, peer_id), failed in zip(first, failures, strict=True):
                if not failed.is_set() and not is_circuit(address):
                    nursery.start_soon(attempt, address, peer_id, trio.Event())
        if refusals and not found:
            raise refusals[0]
        if not found:
            raise SwarmException("; ".join(dict.fromkeys(reasons)) or "no addresses to dial")
        return found[0]

    async def _dial_one(self, address: Multiaddr, peer_id: ID | None) -> INetConn:
        if peer_id == self.self_id:
            raise SwarmException("this is the node itself")
        raw = await self._raw_connection(address, peer_id)
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                muxed = await self._upgrade(raw, peer_id)
            return await self.add_conn(muxed, direction="outbound")
        except BaseException:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await raw.close()
            raise

    async def _raw_connection(self, address: Multiaddr, peer_id: ID | None) -> IRawConnection:
        if is_circuit(address):
            if self.call is None or peer_id is None:
                raise SwarmException("a node behind a relay is dialed by its peer id")
            with trio.fail_after(2 * HANDSHAKE_TIMEOUT_S):  # the relay may have to be dialed too
                return await self.call(address, peer_id)
        transport = self.transport_manager.transport_for_dialing(address)
        if transport is None:
            raise SwarmException("only TCP addresses can be dialed")
        with trio.fail_after(HANDSHAKE_TIMEOUT_S):
            raw = await transport.dial(address)
        if not isinstance(raw, RawConnection):
            raise SwarmException("not a plain TCP connection")
        _note_remote_address(raw.stream)
        return raw

    async def probe(self, address: Multiaddr, peer_id: ID) -> None:
        """Makes sure that the node answers there with its key, and hangs up.

        Raises whatever fails.
        """
        raw = await self._raw_connection(address, peer_id)
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                await self._secure(raw, peer_id)
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await raw.close()

    async def _upgrade(self, raw: IRawConnection, peer_id: ID | None) -> IMuxedConn:
        """Noise and Yamux on an outbound connection, with whoever is there if peer_id is None."""
        secured = await self._secure(raw, peer_id)
        remote = secured.get_remote_peer()
        if remote == self.self_id:
            raise SwarmException("this is the node itself")
        return await self.upgrader.upgrade_connection(secured, remote)

    async def _secure(self, raw: IRawConnection, peer_id: ID | None) -> ISecureConn:
        security = self.upgrader.security_multistream
        (only,) = security.transports.values()
        noise = cast(AdmittingNoise, only)
        try:
            await security.select_transport(raw, True)
        except MultiselectError as error:
            if "not supported" in _reason(error):
                raise noise.nothing_in_common() from error
            raise
        return await noise.get_pattern().handshake_outbound(raw, peer_id)

    # -- inbound -------------------------------------------------------------------------------

    async def _handle_inbound_connection(
        self, read_write_closer: ReadWriteCloser, maddr: Multiaddr
    ) -> None:
        if self.is_hidden:
            await read_write_closer.close()
            return
        _note_remote_address(read_write_closer)
        await self.serve_raw(RawConnection(read_write_closer, False), maddr)

    async def serve_raw(self, raw: RawConnection, maddr: Multiaddr) -> None:
        """Serves one accepted connection until it is closed; only handshakes take a place."""
        muxed: IMuxedConn | None = None
        try:
            with self.anteroom.place((raw.get_remote_address() or ("",))[0]):
                muxed = await self.upgrade_inbound_raw_conn(raw, maddr)
        except Exception as error:  # noqa: BLE001 - strangers send anything; the host must live
            _log.debug("an inbound connection failed: %s", _reason(error))
        if muxed is None:  # refused, too late, or it had to make room
            await raw.close()
            return
        await cast(Yamux, muxed).event_closed.wait()

    # -- both ----------------------------------------------------------------------------------

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        yamux = cast(Yamux, muxed_conn)
        start = yamux.start

        async def start_guarded() -> None:
            try:
                await start()
            except Exception as error:  # noqa: BLE001 - raised here, it would end the whole host
                _log.debug("a connection failed: %s", _reason(error))
                yamux.event_shutting_down.set()
                await yamux._cleanup_on_error()

        yamux.start = start_guarded  # type: ignore[method-assign]
        if self.background_nursery is not None:
            _write_whole_frames(yamux, self.background_nursery)
        return await super().add_conn(muxed_conn, direction)


def _note_remote_address(stream: ReadWriteCloser) -> None:
    """Fills in what the library asks the socket for, which gives four values with IPv6.

    An IPv4 address that came in on an IPv6 socket is one all the same.
    """
    if not isinstance(stream, TrioTCPStream):
        return
    try:
        host, port, *_ = stream.stream.socket.getpeername()
    except OSError as error:
        _log.debug("a connection was gone at once: %s", error)
        return
    address = ipaddress.ip_address(host.partition("%")[0])
    stream._cached_remote_address = str(getattr(address, "ipv4_mapped", None) or address), port


def _write_whole_frames(yamux: Yamux, nursery: trio.Nursery) -> None:
    """Lets a frame that was begun be written to its end, even if its writer is cancelled.

    Half a frame, or a number of the cipher used up for nothing, would end the connection.
    """
    write = yamux.secured_conn.write
    in_turn = trio.Lock()

    async def write_in_background(data: bytes) -> None:
        failure: list[Exception] = []
        done = trio.Event()

        async def run() -> None:
            try:
                async with in_turn:
                    await write(data)
            except Exception as error:  # noqa: BLE001 - raised in the writer instead
                failure.append(error)
            finally:
                done.set()

        nursery.start_soon(run)
        await done.wait()
        if failure:
            raise failure[0]

    yamux.secured_conn.write = write_in_background  # type: ignore[method-assign]


class MeshHost(BasicHost):
    """The library's host, which survives its stream handlers and says what is announced."""

    announced: Callable[[], list[str]] | None = None

    def own_addrs(self) -> list[Multiaddr]:
        """Where this machine listens, as others would dial it."""
        return list(super().get_addrs())

    def get_addrs(self) -> list[Multiaddr]:
        """What others are told by identify and the DHT: the same as in the announcement."""
        if self.announced is None:
            return self.own_addrs()
        return [Multiaddr(text) for text in self.announced()]

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        try:
            await super()._swarm_stream_handler(net_stream)
        except Exception as error:  # noqa: BLE001 - raised here, it would end the whole host
            _log.debug("a stream handler failed: %s", _reason(error))
            await net_stream.reset()


def new_libp2p_host(identity: Identity, admission: Admission) -> MeshHost:
    """A host that offers one Noise and Yamux alone and dials nobody unasked."""
    private_key = Ed25519PrivateKey.from_bytes(identity.secret())
    key_pair = KeyPair(private_key, private_key.get_public_key())
    noise = AdmittingNoise(key_pair, new_x25519_key_pair().private_key, admission)
    peer_id = ID.from_base58(identity.peer_id)
    peer_store = PeerStore()
    peer_store.add_key_pair(peer_id, key_pair)
    swarm = MeshSwarm(
        peer_id,
        peer_store,
        TransportUpgrader(
            secure_transports_by_protocol={noise.protocol: noise},
            muxer_transports_by_protocol={TProtocol(YAMUX_PROTOCOL): Yamux},
        ),
        transports=[TCP()],
        retry_config=RetryConfig(max_retries=0),
        connection_config=ConnectionConfig(
            max_connections=CONNECTIONS_MAX,
            high_watermark=CONNECTIONS_MAX,
            low_watermark=0,
            min_connections=0,
            max_connections_per_peer=CONNECTIONS_PER_NODE_MAX,
            grace_period=0.0,  # else as many of one node as it opens within that time
            inbound_upgrade_timeout=HANDSHAKE_TIMEOUT_S,
            outbound_upgrade_timeout=HANDSHAKE_TIMEOUT_S,
            inbound_stream_protocol_negotiation_timeout=STREAM_OPEN_TIMEOUT_S,
            outbound_stream_protocol_negotiation_timeout=STREAM_OPEN_TIMEOUT_S,
        ),
    )
    swarm.harden()
    return MeshHost(
        swarm, addrs_factory=reachable_addresses, disable_identify_address_discovery=True
    )


def _reason(error: BaseException) -> str:
    """The innermost cause, in a few words."""
    while (cause := error.__cause__) is not None or isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else cause or error
    words = error.strerror if isinstance(error, OSError) else str(error)
    return (words or type(error).__name__)[:200]
