"""What happens in the mesh, as one stream inside the gateway: published once, read by many."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import trio

from shardmesh.wire.limits import EVENTS_WAITING_MAX


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened; `data` holds plain values that JSON can have."""

    number: int  # rises by one with each event of this process
    at_s: float  # wall-clock time, seconds since 1970
    kind: str  # a noun and what became of it: "node.joined", "request.finished"
    cause: str = ""  # a sentence for a person, where one is known
    is_lasting: bool = True  # False: of interest only now, such as one token's timing
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Subscription:
    """One reader's events, oldest first; `n_lost` were dropped because it reads too slowly."""

    def __init__(self, events: trio.MemoryReceiveChannel[Event]) -> None:
        self.n_lost = 0
        self._events = events

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        return await self._events.receive()


class EventHub:
    """Hands each event to all who listen at that moment; publishing never waits."""

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._n_published = 0
        self._readers: dict[Subscription, trio.MemorySendChannel[Event]] = {}
        self._on_event: list[Callable[[Event], None]] = []

    @property
    def n_readers(self) -> int:
        return len(self._readers)

    def tell(self, on_event: Callable[[Event], None]) -> None:
        """Calls this for every event from now on; it must be quick."""
        self._on_event.append(on_event)

    def publish(
        self,
        kind: str,
        *,
        cause: str = "",
        is_lasting: bool = True,
        data: Mapping[str, Any] | None = None,
    ) -> Event:
        """Tells all readers; one that is full misses it, and its `n_lost` says so."""
        self._n_published += 1
        event = Event(
            number=self._n_published,
            at_s=self._wall_clock(),
            kind=kind,
            cause=cause,
            is_lasting=is_lasting,
            data=data or {},
        )
        for on_event in self._on_event:
            on_event(event)
        for reader, channel in self._readers.items():
            try:
                channel.send_nowait(event)
            except trio.WouldBlock:
                reader.n_lost += 1
        return event

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Events from now on, until the block is left."""
        sender, receiver = trio.open_memory_channel[Event](EVENTS_WAITING_MAX)
        reader = Subscription(receiver)
        self._readers[reader] = sender
        try:
            yield reader
        finally:
            del self._readers[reader]
            sender.close()
