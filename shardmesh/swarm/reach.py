"""Finding out whether this node can be reached, and taking a place on a relay if it cannot.

Others are asked to dial back (AutoNAT's idea, with a smaller protocol).  They dial the IP address
that they see the asker at and nothing else, so nobody can be made to send packets to a third party.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Iterable, Sequence

import trio

from shardmesh.errors import RefusedError, ShardmeshError
from shardmesh.swarm.addresses import circuit_addresses
from shardmesh.swarm.host import ConnectionEvent, Host
from shardmesh.swarm.relay import reserve
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.limits import (
    COMMAND_TIMEOUT_S,
    DIAL_BACK_PAUSE_S,
    DIAL_BACK_PORTS_MAX,
    DIAL_BACKS_MAX,
    REACH_INTERVAL_S,
    REACH_OBSERVERS_MAX,
    RELAY_MESSAGE_BYTES_MAX,
    RELAYS_PER_NODE_MAX,
    REQUEST_READ_TIMEOUT_S,
)
from shardmesh.wire.relay import DIAL_BACK_PROTOCOL, DialBackAnswer, DialBackRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReachOptions:
    """How a node is to be reached."""

    announced: tuple[str, ...] = ()  # addresses beside its own, where a router forwards a port
    offers_relay: bool = False
    relay_only: bool = False  # behave as if nobody could dial this node
    direct_links: bool = True  # False: links go over libp2p streams
    mdns: bool = True


def can_be_reached(answers: Iterable[DialBackAnswer]) -> bool | None:
    """What the answers of a round mean; None if nobody answered.

    One that could not reach the node is enough for a relay: neighbours on the same LAN always can.
    """
    verdicts = [bool(answer.reached) for answer in answers]
    return all(verdicts) if verdicts else None


def pause_s_after(n_unanswered: int) -> float:
    """Until the next round: soon, at first, if nobody could be asked; doubled each time."""
    return 0.5 * 2.0 ** min(n_unanswered, 20) if n_unanswered else REACH_INTERVAL_S


# -- dialing back ------------------------------------------------------------------------------


def serve_dial_back(host: Host) -> None:
    """Lets other nodes ask to be dialed back."""
    asked_s: dict[str, float] = {}
    places = trio.CapacityLimiter(DIAL_BACKS_MAX)

    async def serve(stream: ByteStream, peer_id: str) -> None:
        with trio.fail_after(REQUEST_READ_TIMEOUT_S):
            data = await receive_message(stream, RELAY_MESSAGE_BYTES_MAX)
        request = decode_cbor(data, DialBackRequest)
        seen_at = host.observed_host(peer_id)
        if seen_at is None:
            raise RefusedError("a node that comes through a relay cannot be dialed back")
        now_s = trio.current_time()
        for asker in [a for a, since_s in asked_s.items() if now_s - since_s >= DIAL_BACK_PAUSE_S]:
            del asked_s[asker]
        if peer_id in asked_s:
            raise RefusedError("asked to dial back too often")
        asked_s[peer_id] = now_s
        async with places:
            reached = await _probe_all(host, seen_at, request.ports, peer_id)
        await send_message(stream, encode_cbor(DialBackAnswer(host=seen_at, reached=reached)))

    host.serve(DIAL_BACK_PROTOCOL, serve)


async def _probe_all(
    host: Host, seen_at: str, ports: Sequence[int], peer_id: str
) -> tuple[int, ...]:
    reached: list[int] = []

    async def probe(port: int) -> None:
        if await host.probe(seen_at, port, peer_id):
            reached.append(port)

    async with trio.open_nursery() as nursery:
        for port in set(ports):
            nursery.start_soon(probe, port)
    return tuple(sorted(reached))


async def ask_to_dial_back(host: Host, peer_id: str, ports: Sequence[int]) -> DialBackAnswer:
    """Raises UnreachableError (the moment's) or RefusedError (theirs) without an answer."""
    answer = await host.request(
        peer_id,
        DIAL_BACK_PROTOCOL,
        encode_cbor(DialBackRequest(ports=tuple(ports))),
        timeout_s=COMMAND_TIMEOUT_S,
        response_bytes_max=RELAY_MESSAGE_BYTES_MAX,
    )
    return decode_cbor(answer, DialBackAnswer)


# -- being reached -----------------------------------------------------------------------------


class Reach:
    """Keeps a node reachable: `run` it as long as the node is on the network.

    `neighbours` gives the nodes to ask, the best relays first; `changed` is called when the node's
    addresses are others than before.
    """

    def __init__(
        self,
        host: Host,
        *,
        neighbours: Callable[[], list[str]],
        changed: Callable[[], None],
        interval_s: float = REACH_INTERVAL_S,
        logger: logging.Logger | None = None,
    ) -> None:
        self.is_reachable: bool | None = None
        """None as long as nobody could be asked."""
        self._host = host
        self._neighbours = neighbours
        self._changed = changed
        self._interval_s = interval_s
        self._log = logger or logging.getLogger(__name__)
        self._places: dict[str, _Place] = {}
        self._no_relays: set[str] = set()
        self._woken = trio.Event()
        host.on_connection(self._note)

    async def run(self) -> None:
        """Asks and takes places for ever."""
        n_unanswered = 0
        while True:
            self._woken = trio.Event()
            answers = await self._ask_all()
            n_unanswered = 0 if answers else n_unanswered + 1
            self._judge(can_be_reached(answers))
            if self.is_reachable is False:
                await self._take_places()
            else:
                self._places = {}
            self._tell()
            pause_s = min(pause_s_after(n_unanswered), self._interval_s)
            with trio.move_on_after(pause_s * random.uniform(0.8, 1.2)):
                await self._woken.wait()

    def _judge(self, verdict: bool | None) -> None:
        if verdict is not None and verdict != self.is_reachable:
            self.is_reachable = verdict
            self._log.info(
                "[REACH] %s",
                "✓ Others can dial this node"
                if verdict
                else "⚠️  Others cannot dial this node; it takes a place on a relay",
            )

    def _note(self, event: ConnectionEvent) -> None:
        """A first neighbour, or a relay lost: no time to wait."""
        is_first = event.kind == "established" and self.is_reachable is None
        lost = event.kind == "closed" and event.peer_id in self._places
        needs_one = event.kind == "established" and self.is_reachable is False and not self._places
        if is_first or lost or needs_one:
            self._woken.set()

    async def _ask_all(self) -> list[DialBackAnswer]:
        ports = self._host.own_ports()[:DIAL_BACK_PORTS_MAX]
        asked = [p for p in self._neighbours() if self._host.observed_host(p) is not None]
        answers: list[DialBackAnswer] = []

        async def ask(peer_id: str) -> None:
            try:
                answers.append(await ask_to_dial_back(self._host, peer_id, ports))
            except ShardmeshError as error:
                self._log.debug("%s did not say whether it can dial this node: %s", peer_id, error)

        async with trio.open_nursery() as nursery:
            for peer_id in asked[:REACH_OBSERVERS_MAX]:
                nursery.start_soon(ask, peer_id)
        return answers

    async def _take_places(self) -> None:
        """Renews the places that it has and takes more, as far as there are relays."""
        self._places = {
            relay_id: place
            for relay_id, place in self._places.items()
            if self._host.observed_host(relay_id) is not None
        }
        candidates = [*self._places, *(p for p in self._neighbours() if p not in self._places)]
        for relay_id in candidates:
            place = self._places.get(relay_id)
            if place is not None and place.renew_at_s > trio.current_time():
                continue
            if place is None and len(self._places) >= RELAYS_PER_NODE_MAX:
                break
            if relay_id in self._no_relays or self._host.observed_host(relay_id) is None:
                continue
            await self._take_place(relay_id)

    async def _take_place(self, relay_id: str) -> None:
        try:
            given = await reserve(self._host, relay_id)
        except ShardmeshError as error:
            self._places.pop(relay_id, None)
            if error.code == "UNKNOWN_PROTOCOL":
                self._no_relays.add(relay_id)
            else:
                self._log.info("[REACH] ✗ No place on the relay %s: %s", relay_id, error)
            return
        if relay_id not in self._places:
            self._log.info("[REACH] ✓ Reached through the relay %s", relay_id)
        known = self._host.known_addresses(relay_id)
        self._places[relay_id] = _Place(
            addresses=circuit_addresses(relay_id, known, given.addresses),
            renew_at_s=trio.current_time() + given.lifetime_s / 2,
        )

    def _tell(self) -> None:
        addresses = [a for place in self._places.values() for a in place.addresses]
        relays = set(self._places)
        if self._host.come_through(relays, addresses):
            self._changed()


@dataclasses.dataclass(frozen=True)
class _Place:
    addresses: tuple[str, ...]
    renew_at_s: float
