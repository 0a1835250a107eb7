"""The other end of a link, played by hand: it says only what a test has it say."""

from __future__ import annotations

import trio

from shardmesh.errors import ShardmeshError
from shardmesh.links.link import Link
from shardmesh.wire.framing import LENGTH, RecordReader
from shardmesh.wire.messages import (
    LINK_VERSION,
    Hello,
    Message,
    decode_message,
    encode_message,
)
from shardmesh.wire.sealing import KeyExchange, LinkKeys, Opener, Sealer


def new_keys() -> LinkKeys:
    here, there = KeyExchange(), KeyExchange()
    return here.agree(there.public_key, link_id=bytes(16), dialer="near", acceptor="far")


class Recorder:
    """A LinkUser that keeps what it is told; `refuse` is raised for every message, if set."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.bodies: list[bytes] = []
        self.errors: list[ShardmeshError] = []
        self.refuse: ShardmeshError | None = None
        self.n_suspicions = 0
        self.read_at: list[int] = []  # after how many messages all that had arrived was read
        self.closed = trio.Event()
        self._changed = trio.Event()

    def on_message(self, link: Link, message: Message, body: memoryview) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.messages.append(message)
        self.bodies.append(bytes(body))
        self._changed.set()
        self._changed = trio.Event()

    def on_all_read(self, link: Link) -> None:
        self.read_at.append(len(self.messages))

    def on_suspected(self, link: Link) -> None:
        self.n_suspicions += 1

    def on_closed(self, link: Link, error: ShardmeshError) -> None:
        self.errors.append(error)
        self.closed.set()

    async def heard(self, n_messages: int) -> None:
        while len(self.messages) < n_messages:
            await self._changed.wait()

    async def end(self) -> ShardmeshError:
        """Why the link ended, told exactly once."""
        await self.closed.wait()
        (error,) = self.errors
        return error


class FarEnd:
    """The accepting end of a link."""

    def __init__(self, stream: trio.abc.Stream, keys: LinkKeys) -> None:
        self.stream = stream
        self._sealer, self._opener = (
            Sealer(keys.acceptor_to_dialer),
            Opener(keys.dialer_to_acceptor),
        )
        self._reader = RecordReader()
        self._records: list[bytes] = []

    def sealed(self, message: Message, body: bytes = b"") -> bytes:
        return self.sealed_raw(encode_message(message, body))

    def sealed_raw(self, frame: bytes) -> bytes:
        """Any bytes as a record that opens."""
        record = self._sealer.seal(frame)
        return LENGTH.pack(len(record)) + record

    async def send(self, message: Message, body: bytes = b"") -> None:
        await self.stream.send_all(self.sealed(message, body))

    async def receive(self) -> Message:
        """The next message; raises EOFError at the end."""
        while not self._records:
            data = await self.stream.receive_some(65536)
            if not data:
                raise EOFError
            self._records = self._reader.feed(data)
        return decode_message(self._opener.open(self._records.pop(0)))[0]

    async def greet(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.send, Hello(version=LINK_VERSION))
            await self.receive()
