"""A network of memory: connections with delays, partitions, frozen ends and spoiled bytes.

Like TCP, a connection delivers what it delivers in order; like TCP without its checksum, a fault
may flip a bit or deliver a record twice, which the sealing of links has to notice.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from typing import Literal

import trio

Spoil = Literal["flip", "double", "swap"]

DELAY_MIN_S = 0.0002
DELAY_MAX_S = 0.003


class Network:
    """What lies between the nodes; nodes are named, and frozen or cut off by name."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self.gone: set[str] = set()  # lost power: not even the ends of its connections arrive
        self._frozen: set[str] = set()
        self._parted: set[frozenset[str]] = set()
        self._slow: dict[frozenset[str], float] = {}
        self._spoil: dict[frozenset[str], Spoil] = {}
        self._changed = trio.Event()

    # -- faults --------------------------------------------------------------------------------

    def freeze(self, name: str) -> None:
        """SIGSTOP: the node neither reads nor writes; what it has written still arrives."""
        self._frozen.add(name)

    def thaw(self, name: str) -> None:
        self._frozen.discard(name)
        self._tell()

    def part(self, one: str, other: str) -> None:
        """Nothing gets from one to the other until `join`; nothing is lost either."""
        self._parted.add(frozenset((one, other)))

    def join(self, one: str, other: str) -> None:
        self._parted.discard(frozenset((one, other)))
        self._tell()

    def slow_down(self, one: str, other: str, delay_s: float) -> None:
        """Adds to the delay between two nodes; 0 makes it normal again."""
        self._slow[frozenset((one, other))] = delay_s

    def spoil_next(self, one: str, other: str, how: Spoil) -> None:
        """Spoils one of the next records between two nodes."""
        self._spoil[frozenset((one, other))] = how

    def heal(self) -> None:
        """All nodes reach each other again."""
        self._frozen.clear()
        self._parted.clear()
        self._slow.clear()
        self._spoil.clear()
        self._tell()

    # -- for the connections -------------------------------------------------------------------

    def is_frozen(self, name: str) -> bool:
        return name in self._frozen

    def is_parted(self, one: str, other: str) -> bool:
        return frozenset((one, other)) in self._parted

    async def wait_thawed(self, name: str) -> None:
        await trio.lowlevel.checkpoint()
        while self.is_frozen(name):
            await self.wait_changed()

    async def wait_changed(self) -> None:
        await self._changed.wait()

    def delay_s(self, one: str, other: str) -> float:
        extra_s = self._slow.get(frozenset((one, other)), 0.0)
        return extra_s + self._chance.uniform(DELAY_MIN_S, DELAY_MAX_S)

    def take_spoil(self, one: str, other: str) -> Spoil | None:
        return self._spoil.pop(frozenset((one, other)), None)

    def connect(self, one: str, other: str) -> tuple[trio.abc.Stream, trio.abc.Stream]:
        """Both ends of a new connection."""
        there, back = _Direction(self, one, other), _Direction(self, other, one)
        return _SimulatedStream(self, one, back, there), _SimulatedStream(self, other, there, back)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


@dataclasses.dataclass
class _Direction:
    """What one end of a connection has written and the other has not read."""

    network: Network
    source: str
    target: str
    arrived: trio.Event = dataclasses.field(default_factory=trio.Event)
    records: deque[tuple[float, bytes]] = dataclasses.field(default_factory=deque)
    last_due_s: float = 0.0
    is_closed: bool = False  # by either end

    def put(self, data: bytes) -> None:
        if self.source in self.network.gone:
            return
        due_s = trio.current_time() + self.network.delay_s(self.source, self.target)
        self.last_due_s = max(self.last_due_s, due_s)  # in order
        self.records.append((self.last_due_s, data))
        self.tell()

    def spoiled_put(self, data: bytes, how: Spoil) -> None:
        if how == "flip":
            data = data[:-1] + bytes((data[-1] ^ 1,))
        self.put(data)
        if how == "double":
            self.put(data)
        if how == "swap" and len(self.records) > 1:
            (due_s, last), (before_s, before) = self.records[-1], self.records[-2]
            self.records[-2], self.records[-1] = (before_s, last), (due_s, before)

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self.put(b"")  # the end of the stream travels like everything else

    def tell(self) -> None:
        self.arrived.set()
        self.arrived = trio.Event()


class _SimulatedStream(trio.abc.Stream):
    def __init__(
        self, network: Network, owner: str, inward: _Direction, outward: _Direction
    ) -> None:
        self._network = network
        self._owner = owner
        self._inward = inward
        self._outward = outward
        self._rest = b""
        self._is_closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._network.wait_thawed(self._owner)
        if self._is_closed:
            raise trio.ClosedResourceError
        inward = self._inward
        if inward.is_closed and not self._network.is_parted(inward.source, inward.target):
            raise trio.BrokenResourceError
        how = self._network.take_spoil(self._outward.source, self._outward.target)
        if how is None:
            self._outward.put(bytes(data))
        else:
            self._outward.spoiled_put(bytes(data), how)

    async def wait_send_all_might_not_block(self) -> None:
        await self._network.wait_thawed(self._owner)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self._rest:
            self._rest = await self._next_record()
        taken, self._rest = self._rest[:max_bytes], self._rest[max_bytes:] if max_bytes else b""
        return taken

    async def _next_record(self) -> bytes:
        inward, network = self._inward, self._network
        while True:
            if self._is_closed:
                raise trio.ClosedResourceError
            due_s = inward.records[0][0] if inward.records else math.inf
            if network.is_frozen(self._owner) or network.is_parted(inward.source, inward.target):
                await network.wait_changed()
            elif due_s <= trio.current_time():
                return inward.records.popleft()[1]
            else:
                with trio.move_on_at(due_s):
                    await inward.arrived.wait()

    async def aclose(self) -> None:
        self._is_closed = True
        self._outward.close()
        self._inward.is_closed = True
        self._inward.tell()
        await trio.lowlevel.checkpoint()
