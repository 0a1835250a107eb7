"""One encrypted connection between two data processes, or a coordinator and a data process.

A link has one reader task, one writer task and one heartbeat task.  Whoever uses it calls `send`,
which never waits, and is called back for each message, on the trio loop, without waiting either.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from typing import Literal, Protocol

import trio

from shardmesh.errors import (
    BusyError,
    ProtocolError,
    ShardmeshError,
    UnreachableError,
    known_error,
)
from shardmesh.links.outbox import Outbox
from shardmesh.links.resending import resend_steadily
from shardmesh.links.round_trips import RoundTrips
from shardmesh.links.silence import SilenceWatch
from shardmesh.wire.framing import RecordReader
from shardmesh.wire.limits import HANDSHAKE_TIMEOUT_S, HEARTBEAT_INTERVAL_S, HEARTBEAT_TIMEOUT_S
from shardmesh.wire.messages import (
    LINK_VERSION,
    Hello,
    Message,
    Ping,
    Pong,
    decode_message,
    encode_message,
)
from shardmesh.wire.sealing import LinkKeys, Opener, Sealer

logger = logging.getLogger(__name__)

READ_BYTES_MIN = 64 * 1024
READ_BYTES_MAX = 1024 * 1024  # a buffer of this size is made for each read of a large body
BEATS_PER_ROUND_TRIP = 8  # on the side that was dialed, whose pings are for nothing else
SILENCE_LATE_S = HEARTBEAT_INTERVAL_S / 5  # so late is a silence noticed at most

_CLOSED_HERE = UnreachableError("the link was closed on this side", code="LINK_CLOSED")


LinkKind = Literal["direct", "stream"]
"""Over a TCP connection of its own, or over a libp2p stream of the two control processes."""


class LinkUser(Protocol):
    """Whoever a link belongs to; all are called on the trio loop and must not raise or wait.

    A ProtocolError out of `on_message` is the exception: it closes the link.
    """

    def on_message(self, link: Link, message: Message, body: memoryview) -> None: ...

    def on_all_read(self, link: Link) -> None:
        """No further message has arrived yet."""
        ...

    def on_suspected(self, link: Link) -> None: ...

    def on_closed(self, link: Link, error: ShardmeshError) -> None: ...


class Link:
    """A connection whose keys are agreed; `run` carries it until it ends."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        keys: LinkKeys,
        *,
        is_dialer: bool,
        peer_id: str,
        user: LinkUser,
    ) -> None:
        outward, inward = keys.dialer_to_acceptor, keys.acceptor_to_dialer
        if not is_dialer:
            outward, inward = inward, outward
        resend_steadily(stream)
        self.peer_id = peer_id
        self.kind: LinkKind = "direct"
        self._is_dialer = is_dialer
        self._stream = stream
        self._outbox = Outbox(stream, Sealer(outward), peer_id)
        self._opener = Opener(inward)
        self._user = user
        self._reader = RecordReader()
        self._pending: deque[bytes] = deque()
        self._silence = SilenceWatch(trio.current_time())
        self.is_suspected = False
        """The other side has been silent for longer than usual."""
        self._round_trips = RoundTrips()
        self._closing: ShardmeshError | None = None
        self._scope = trio.CancelScope()

    @property
    def is_open(self) -> bool:
        return self._closing is None

    @property
    def half_round_trip_us(self) -> int:
        """Half of the shortest of the last round trips; 0 before the first."""
        return int(self._round_trips.shortest_s / 2 * 1e6)

    def send(self, message: Message, body: bytes | memoryview = b"") -> None:
        """Sends a message without waiting; from any thread.

        Raises BusyError (the moment's) when too much waits to be sent and UnreachableError when
        the link has ended; the message is not sent then.
        """
        self._outbox.put(encode_message(message, body))

    def hold(self) -> None:
        """Has what is sent from now on wait for `release`, which writes all of it at once."""
        self._outbox.hold()

    def release(self) -> None:
        """See `hold`."""
        self._outbox.release()

    async def flush(self) -> None:
        """Waits until all that was sent is with the network, or the link has ended."""
        await self._outbox.flush()

    def close(self, error: ShardmeshError | None = None) -> None:
        """Ends the link now; `run` returns and the user is told."""
        if self._closing is None:
            self._closing = error or _CLOSED_HERE
        self._scope.cancel()

    async def greet(self) -> None:
        """Exchanges hellos, which proves the keys; to be done once, before `run`.

        Raises ProtocolError (theirs) or UnreachableError (the moment's); the connection is closed
        then, and also on a cancellation.
        """
        begun_s = trio.current_time()
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT_S):
                await self._outbox.write_first(encode_message(Hello(version=LINK_VERSION)))
                message, _ = await self._receive()
            if not isinstance(message, Hello) or message.version != LINK_VERSION:
                raise ProtocolError("the link did not begin with a hello of this version")
            if self._is_dialer:  # the other one's hello was here before it was asked for
                self._round_trips.greeted(trio.current_time() - begun_s)
        except (trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            await trio.aclose_forcefully(self._stream)
            raise UnreachableError(f"{self.peer_id} did not greet", code="LINK_LOST") from error
        except BaseException:
            await trio.aclose_forcefully(self._stream)
            raise

    async def run(self) -> None:
        """Carries the link until it ends, tells the user why, and returns.

        A cancellation closes the connection and is passed on.
        """
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read)
                    nursery.start_soon(self._outbox.write_forever)
                    nursery.start_soon(self._heartbeat)
        except* (ShardmeshError, trio.BrokenResourceError, trio.ClosedResourceError) as group:
            self._end(_cause(group))
        except* trio.TooSlowError:
            self._end(UnreachableError(f"{self.peer_id} took too long", code="LINK_TIMEOUT"))
        finally:
            self._end(_CLOSED_HERE)
            try:
                await trio.aclose_forcefully(self._stream)
            finally:  # closing raises Cancelled if `run` itself is cancelled
                self._user.on_closed(self, self._closing or _CLOSED_HERE)

    def _end(self, error: ShardmeshError) -> None:
        if self._closing is None:
            self._closing = error
        self._outbox.close()

    def _n_read(self) -> int:
        return min(max(self._reader.n_wanted, READ_BYTES_MIN), READ_BYTES_MAX)

    async def _read(self) -> None:
        while True:
            message, body = await self._receive()
            match message:
                case Ping():
                    self._send_beat(Pong(number=message.number))
                case Pong():
                    self._round_trips.answered(message.number, trio.current_time())
                case Hello():
                    raise ProtocolError("a second hello on one link")
                case _:
                    self._user.on_message(self, message, body)
            if not self._pending:
                self._user.on_all_read(self)

    async def _heartbeat(self) -> None:
        """Has both sides speak once in each interval.

        The one that dialed pings and the other answers, which says as much.  Only if no ping came,
        or now and then to know the round trip, it pings as well.
        """
        n_beats = n_sent = 0
        calm_s = HEARTBEAT_INTERVAL_S
        while True:
            is_quiet = self._outbox.n_put == n_sent
            if self._is_dialer or is_quiet or n_beats % BEATS_PER_ROUND_TRIP == 0:
                self._send_beat(Ping(number=self._round_trips.next_ping(trio.current_time())))
            n_beats, n_sent = n_beats + 1, self._outbox.n_put
            next_beat_s = _next_beat_s(trio.current_time())
            while (now_s := trio.current_time()) < next_beat_s:
                # Each waking up takes time from whoever computes: not before there can be news.
                await trio.sleep(min(max(calm_s, SILENCE_LATE_S), next_beat_s - now_s))
                calm_s = self._check_silence(trio.current_time())

    def _check_silence(self, now_s: float) -> float:
        """Notices a silence; seconds from now on in which there can be none."""
        silence_s = self._silence.silence_s(now_s)
        if silence_s > HEARTBEAT_TIMEOUT_S:
            raise UnreachableError(
                f"{self.peer_id} was silent for {HEARTBEAT_TIMEOUT_S:.0f} s", code="LINK_SILENT"
            )
        patience_s = self._silence.patience_s(now_s, self._round_trips.shortest_s)
        was_suspected, self.is_suspected = self.is_suspected, silence_s > patience_s
        if self.is_suspected and not was_suspected:
            logger.info("%s has been silent for %.1f s", self.peer_id, silence_s)
            self._user.on_suspected(self)
        return patience_s - silence_s

    def _send_beat(self, beat: Ping | Pong) -> None:
        """Sends a heartbeat, unless so much waits to be written that it would say nothing new."""
        with contextlib.suppress(BusyError):  # WRITE_TIMEOUT_S ends a link that stays full
            self.send(beat)

    async def _receive(self) -> tuple[Message, memoryview]:
        while not self._pending:
            data = await self._stream.receive_some(self._n_read())
            if not data:
                raise UnreachableError(f"{self.peer_id} closed the link", code="LINK_LOST")
            self._silence.heard(trio.current_time())
            self.is_suspected = False
            self._pending.extend(self._reader.feed(data))
        return decode_message(self._opener.open(self._pending.popleft()))


def _next_beat_s(now_s: float) -> float:
    """The same for all links of a process, which wakes up once for all of them."""
    return (now_s // HEARTBEAT_INTERVAL_S + 1) * HEARTBEAT_INTERVAL_S


def _cause(group: BaseExceptionGroup[Exception]) -> ShardmeshError:
    """The one error to report of all that ended the link's tasks."""
    return known_error(group) or UnreachableError("the connection broke", code="LINK_LOST")
