"""What the console is told over its WebSocket: a snapshot, then what changes.

Whatever happens, `touch` is called; at most FEED_INTERVAL_S later every subscriber has the change.
All subscribers share the bytes of a message.  One that does not read loses the changes, never the
state: it gets a new snapshot when it reads again.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import trio

from shardmesh.errors import BusyError
from shardmesh.web.event_store import KeptEvent
from shardmesh.web.state import Json, changes
from shardmesh.wire.codec import encode_json

FEED_VERSION: Final = 1
"""Of the messages; a page of another version reloads itself."""

FEED_INTERVAL_S: Final = 0.1
"""Changes of so long go out together: 10 messages a second are smooth, and within 300 ms."""

SUBSCRIBERS_MAX: Final = 2000
"""Pages that look on at once; each costs some tens of KB."""

MESSAGES_WAITING_MAX: Final = 32
"""Messages that wait for one subscriber; three seconds of changes."""

TICK_INTERVAL_S: Final = 10.0
"""A message goes out at least this often, so that a page notices a dead connection."""


class Subscription:
    """What one page has not been told yet."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._waiting: collections.deque[bytes] = collections.deque()
        self._is_behind = True  # a new one needs a snapshot first
        self._changed = trio.Event()

    async def next(self) -> bytes:
        """The next message; waits for it."""
        while not (self._is_behind or self._waiting):
            await self._changed.wait()
            self._changed = trio.Event()
        if self._is_behind:
            self._is_behind = False
            self._waiting.clear()
            return self._feed.snapshot()
        await trio.lowlevel.checkpoint()
        return self._waiting.popleft()

    def put(self, message: bytes) -> None:
        """Never waits; one too many means that a snapshot comes next."""
        if len(self._waiting) >= MESSAGES_WAITING_MAX:
            self._waiting.clear()
            self._is_behind = True
        if not self._is_behind:
            self._waiting.append(message)
        self._changed.set()


class Feed:
    """The state document, told to all who subscribe.

    `document` builds it; it is called on the trio loop and must be quick.
    """

    def __init__(
        self, document: Callable[[], Json], *, interval_s: float = FEED_INTERVAL_S
    ) -> None:
        self._document = document
        self._interval_s = interval_s
        self._shown: Json = {}
        self._number = 0
        self._snapshot: bytes | None = None
        self._touched = trio.Event()
        self._subscriptions: set[Subscription] = set()
        self._on_seen: list[Callable[[], None]] = []

    @property
    def n_subscribers(self) -> int:
        return len(self._subscriptions)

    def tell_seen(self, on_seen: Callable[[], None]) -> None:
        """Calls this whenever somebody looks on where nobody did."""
        self._on_seen.append(on_seen)

    def touch(self) -> None:
        """Something that is shown may have changed."""
        self._touched.set()

    def tell_events(self, events: Sequence[KeptEvent]) -> None:
        """New events, to everybody now."""
        if events:
            self._tell({"type": "events", "events": [dataclasses.asdict(e) for e in events]})

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """A subscription, over at the end of the block.

        Raises BusyError (the moment's) for one too many.
        """
        if len(self._subscriptions) >= SUBSCRIBERS_MAX:
            raise BusyError("too many pages look on at once", next_step="close some")
        is_first = not self._subscriptions
        if is_first:  # nobody looked on: what was shown last is old
            self._shown, self._snapshot = {}, None
        subscription = Subscription(self)
        self._subscriptions.add(subscription)
        if is_first:
            for tell in self._on_seen:
                tell()
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)

    def snapshot(self) -> bytes:
        """The whole state as of the last change that went out."""
        if self._snapshot is None:
            if not self._shown:
                self._shown = self._document()
            self._snapshot = encode_json(
                {"type": "state", "number": self._number, "state": self._shown}
            )
        return self._snapshot

    async def run(self) -> None:
        """Tells of changes until cancelled."""
        while True:
            with trio.move_on_after(TICK_INTERVAL_S) as idle:
                await self._touched.wait()
            self._touched = trio.Event()
            if idle.cancelled_caught:
                self._tell({"type": "tick"})
            if self._subscriptions:
                self.tell_changes()
            await trio.sleep(self._interval_s)

    def tell_changes(self) -> None:
        """Compares the document with what is known outside and tells the difference."""
        document = self._document()
        patch = changes(self._shown, document)
        if not patch:
            return
        self._shown = document
        self._number += 1
        self._snapshot = None
        self._tell({"type": "patch", "number": self._number, "patch": patch})

    def _tell(self, message: Mapping[str, Any]) -> None:
        if not self._subscriptions:
            return
        data = encode_json(message)
        for subscription in self._subscriptions:
            subscription.put(data)
