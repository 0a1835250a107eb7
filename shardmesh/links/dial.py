"""Bringing up links: dialing an endpoint, and accepting those that were offered."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

import trio

from shardmesh.anteroom import Anteroom
from shardmesh.errors import (
    BusyError,
    ProtocolError,
    RefusedError,
    ShardmeshError,
    UnreachableError,
)
from shardmesh.links.link import Link, LinkKind, LinkUser
from shardmesh.wire.limits import (
    ANNOUNCEMENT_ADDRESSES_MAX,
    DIAL_STAGGER_S,
    EXPECTED_LINKS_MAX,
    EXPECTED_LINKS_PER_NODE_MAX,
    HANDSHAKE_TIMEOUT_S,
    LINK_STREAM_DELAY_S,
    LINKS_MAX,
    UNNAMED_CONNECTIONS_MAX,
)
from shardmesh.wire.link_agreement import Endpoint, LinkGrant
from shardmesh.wire.sealing import LINK_ID_BYTES

logger = logging.getLogger(__name__)

UNHURRIED_S = 0.5
"""How long whoever needs a link waits for a dial that was begun before anybody needed it."""

EXPECTED_LIFETIME_S = 2 * HANDSHAKE_TIMEOUT_S


async def dial(grant: LinkGrant, user: LinkUser) -> Link:
    """A greeted link to the first endpoint that answers; the caller runs it.

    All endpoints are tried, each with a head start on the next: a machine has addresses that lead
    nowhere from here, or to something else that says nothing.  The libp2p stream comes last, since
    it costs more on every hop.  Of several ways to the node the one that names the link first wins,
    for a link is only taken once.
    Raises UnreachableError (the moment's) when none will do.  A cancellation leaves no connection.
    """
    race = _Race(grant, user)
    try:
        await race.run()
    except BaseException:
        if race.stream is not None:  # cancelled between the greeting and the return
            await trio.aclose_forcefully(race.stream)
        raise
    if race.link is not None:
        return race.link
    tried = [f"{e.host}:{e.port}" for e in grant.endpoints]
    tried += ["a libp2p stream"] if grant.stream is not None else []
    raise UnreachableError(
        f"no link to {grant.peer_id}: tried {', '.join(tried) or 'nothing, as it offers nothing'}",
        code="NO_LINK",
        next_step="open the data port of that machine in its firewall (--data-port fixes it)",
    ) from race.error


class _Race:
    """Attempts at one link; no more at once than a grant has endpoints, and the stream."""

    def __init__(self, grant: LinkGrant, user: LinkUser) -> None:
        self.link: Link | None = None
        self.stream: trio.SocketStream | None = None  # of that link
        self.error: Exception | None = None
        self._grant = grant
        self._user = user
        self._scope = trio.CancelScope()

    async def run(self) -> None:
        """Until there is a link, or all have failed."""
        grant = self._grant
        attempts = [trio.Event() for _ in grant.endpoints]
        with self._scope:
            async with trio.open_nursery() as nursery:
                for endpoint, is_over in zip(grant.endpoints, attempts, strict=True):
                    nursery.start_soon(self._attempt, endpoint, "direct", is_over)
                    with trio.move_on_after(DIAL_STAGGER_S):
                        await is_over.wait()
                if grant.stream is not None:
                    with trio.move_on_after(LINK_STREAM_DELAY_S):
                        for is_over in attempts:
                            await is_over.wait()
                    await self._attempt(grant.stream, "stream", trio.Event())

    async def _attempt(self, endpoint: Endpoint, kind: LinkKind, is_over: trio.Event) -> None:
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                stream = await trio.open_tcp_stream(endpoint.host, endpoint.port)
            link = await _greeted(stream, self._grant, self._user)
        except (OSError, trio.TooSlowError, trio.BrokenResourceError, ShardmeshError) as error:
            logger.debug("%s:%d gives no link: %s", endpoint.host, endpoint.port, error)
            self.error = error
            is_over.set()
            return
        if self.link is not None:  # one that takes a link twice
            await trio.aclose_forcefully(stream)
            return
        link.kind = kind
        self.link, self.stream = link, stream
        self._scope.cancel()


async def _greeted(stream: trio.SocketStream, grant: LinkGrant, user: LinkUser) -> Link:
    try:
        await stream.send_all(grant.link_id)
        link = Link(stream, grant.keys, is_dialer=True, peer_id=grant.peer_id, user=user)
        await link.greet()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return link


@dataclasses.dataclass(frozen=True)
class _Expected:
    grant: LinkGrant
    until_s: float


class Acceptor:
    """Accepts connections and runs those that name a link which was offered before."""

    def __init__(self, user: LinkUser) -> None:
        self._user = user
        self._expected: dict[bytes, _Expected] = {}
        self._anteroom = Anteroom(UNNAMED_CONNECTIONS_MAX)
        self._links: set[Link] = set()

    def expect(self, grant: LinkGrant) -> None:
        """Lets the holder of this grant connect once, within ten seconds.

        Raises BusyError (the moment's) when too many are expected or open already.
        """
        now_s = trio.current_time()
        self._expected = {k: e for k, e in self._expected.items() if e.until_s > now_s}
        n_of_node = sum(e.grant.peer_id == grant.peer_id for e in self._expected.values())
        if len(self._expected) >= EXPECTED_LINKS_MAX or n_of_node >= EXPECTED_LINKS_PER_NODE_MAX:
            raise BusyError("too many links are being set up")
        if len(self._links) >= LINKS_MAX:
            raise BusyError("this node has all the links that it can have")
        self._expected[grant.link_id] = _Expected(grant, now_s + EXPECTED_LIFETIME_S)

    def cut_off(self, peer_ids: Collection[str]) -> None:
        """Ends the links of these nodes and what was offered to them."""
        kept = self._expected.items()
        self._expected = {k: e for k, e in kept if e.grant.peer_id not in peer_ids}
        _close_links(self._links, peer_ids)

    async def handle(self, stream: trio.abc.Stream) -> None:
        """Serves one accepted connection to its end; for `trio.serve_listeners`."""
        link: Link | None = None
        try:
            with self._anteroom.place(_origin(stream)):
                link = await self._named(stream)
        except (ShardmeshError, OSError, trio.BrokenResourceError) as error:
            logger.info("a connection was refused: %s", error)
        if link is None:  # refused, too late, or it had to make room
            await trio.aclose_forcefully(stream)
            return
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)

    async def _named(self, stream: trio.abc.Stream) -> Link:
        link_id = b""
        while len(link_id) < LINK_ID_BYTES:
            data = await stream.receive_some(LINK_ID_BYTES - len(link_id))
            if not data:
                raise ProtocolError("the connection ended before it named a link")
            link_id += data
        expected = self._expected.pop(link_id, None)
        if expected is None or expected.until_s < trio.current_time():
            raise ProtocolError("the connection names no link that was offered", code="NO_LINK")
        grant = expected.grant
        link = Link(stream, grant.keys, is_dialer=False, peer_id=grant.peer_id, user=self._user)
        await link.greet()
        return link


def _origin(stream: trio.abc.Stream) -> str:
    """The IP address that a connection came from; empty if it is not of TCP or broken already."""
    if not isinstance(stream, trio.SocketStream):
        return ""
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return ""


Agree = Callable[[str, tuple[str, ...]], Awaitable[LinkGrant]]
"""Agrees with (peer id, its addresses) on a link, over libp2p."""


class LinkPool:
    """One link for each node that is dialed, shared by all who ask for it.

    One that has fallen silent is kept until it ends, since it may come back for those who use it,
    and who asks meanwhile gets a new one: TCP waits longer after each packet that it has lost, and
    a new connection gets through sooner when a network is whole again.
    """

    def __init__(self, nursery: trio.Nursery, agree: Agree, user: LinkUser) -> None:
        self._nursery = nursery
        self._agree = agree
        self._user = user
        self._links: dict[str, Link] = {}
        self._silent: dict[str, Link] = {}  # those that a newer one took the place of
        self._dialing: dict[str, trio.Lock] = {}
        self._unhurried: dict[str, trio.CancelScope] = {}  # dials that nobody waited for at first

    async def get(self, peer_id: str, addresses: tuple[str, ...], timeout_s: float) -> Link:
        """The open link to a node, made if there is none that is well.

        Raises what agreeing and dialing raise, and UnreachableError after `timeout_s`.
        """
        unhurried = self._unhurried.get(peer_id)
        if unhurried is not None:  # it may hang, where a new one gets on
            unhurried.deadline = min(unhurried.deadline, trio.current_time() + UNHURRIED_S)
        return await self._shared(peer_id, addresses, timeout_s)

    async def _shared(self, peer_id: str, addresses: tuple[str, ...], timeout_s: float) -> Link:
        lock = self._dialing.setdefault(peer_id, trio.Lock())
        try:
            with trio.fail_after(timeout_s):
                async with lock:
                    link = self.open_link(peer_id)
                    if link is None or link.is_suspected:
                        grant = await self._agree(peer_id, addresses)
                        link = await dial(grant, self._user)
                        self._take(link)
                    return link
        except trio.TooSlowError:
            raise UnreachableError(
                f"{peer_id} did not answer within {timeout_s:.0f} s", code="LINK_TIMEOUT"
            ) from None
        finally:
            if not lock.locked():  # nobody waits: strangers name the nodes, so none is kept
                self._dialing.pop(peer_id, None)

    def open_link(self, peer_id: str) -> Link | None:
        """The link to a node if there is one, be it silent; nothing is done for it."""
        link = self._links.get(peer_id)
        return link if link is not None and link.is_open else None

    def dial_soon(self, peer_id: str, addresses: tuple[str, ...], timeout_s: float) -> None:
        """Has a node dialed to which there is no link that is well; not waited for."""
        link = self.open_link(peer_id)
        if (link is None or link.is_suspected) and peer_id not in self._dialing:
            self._nursery.start_soon(self._try_to_get, peer_id, addresses, timeout_s)

    def links(self) -> list[Link]:
        """Those that are open now, one for each node."""
        return [link for link in self._links.values() if link.is_open]

    def round_trips_us(self) -> dict[str, int]:
        """The measured round trips of the open links, by peer id."""
        return {
            peer_id: 2 * link.half_round_trip_us
            for peer_id, link in self._links.items()
            if link.is_open and link.half_round_trip_us
        }

    def close(self) -> None:
        """Ends all links."""
        for link in self._all():
            link.close()

    def cut_off(self, peer_ids: Collection[str]) -> None:
        """Ends the links to these nodes."""
        _close_links(self._all(), peer_ids)

    def _all(self) -> list[Link]:
        return [*self._links.values(), *self._silent.values()]

    def _take(self, link: Link) -> None:
        """A new link; the one before may go on, but not the one before that."""
        former = self.open_link(link.peer_id)
        if former is not None:
            oldest = self._silent.get(link.peer_id)
            if oldest is not None:
                oldest.close()
            self._silent[link.peer_id] = former
        self._links[link.peer_id] = link
        self._nursery.start_soon(self._carry, link)

    async def _try_to_get(self, peer_id: str, addresses: tuple[str, ...], timeout_s: float) -> None:
        self._unhurried[peer_id] = scope = trio.CancelScope()
        try:
            with scope:
                await self._shared(peer_id, addresses, timeout_s)
        except ShardmeshError as error:
            logger.debug("no link to %s yet: %s", peer_id, error)
        finally:
            self._unhurried.pop(peer_id, None)

    async def _carry(self, link: Link) -> None:
        try:
            await link.run()
        finally:
            for links in (self._links, self._silent):
                if links.get(link.peer_id) is link:
                    del links[link.peer_id]


def _close_links(links: Iterable[Link], peer_ids: Collection[str]) -> None:
    for link in list(links):
        if link.peer_id in peer_ids:
            link.close(RefusedError(f"{link.peer_id} was removed from the cluster"))


def local_endpoints(addresses: list[str], port: int) -> tuple[Endpoint, ...]:
    """The data port on the IP addresses among libp2p multiaddresses, as many as an offer may have.

    Their order stays.
    """
    hosts: list[str] = []
    for address in addresses:
        parts = address.split("/")
        is_ip = len(parts) > 2 and parts[1] in ("ip4", "ip6") and "%" not in parts[2]
        is_own = "p2p-circuit" not in parts  # else it is a relay's
        if is_ip and is_own and parts[2] not in hosts:
            hosts.append(parts[2])
    return tuple(Endpoint(host=host, port=port) for host in hosts[:ANNOUNCEMENT_ADDRESSES_MAX])


def own_endpoint(listen_hosts: Sequence[str], port: int) -> Endpoint:
    """Where a process that listens on these IP addresses is reached on its own machine."""
    host = listen_hosts[0]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return Endpoint(host=host, port=port)
