"""What the control and the data process of one listener say to each other.

Both ends are the same program on the same machine, so a path and keys may go over this pipe; it is
never reached from the network.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import trio

from shardmesh.errors import (
    ProtocolError,
    ShardmeshError,
    UnreachableError,
)
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.error_report import ErrorReport, told
from shardmesh.wire.framing import LENGTH, RecordReader
from shardmesh.wire.limits import MIB, SESSIONS_PER_NODE_MAX
from shardmesh.wire.link_agreement import Endpoint, LinkGrant
from shardmesh.wire.messages import NextStage
from shardmesh.wire.sealing import DirectionKey, LinkKeys

LOCAL_MESSAGE_BYTES_MAX = 1 * MIB
"""The largest is a report of metrics, a few KiB."""

LOCAL_WRITE_TIMEOUT_S = 1.0
"""The other process reads at once and the pipe holds 64 KiB; one that takes longer hangs."""

PROCESS_GONE = "PROCESS_GONE"
READ_BYTES = 64 * 1024


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Start(_Message, frozen=True, tag="start"):
    """First message to a data process: what to load and where to listen."""

    shard_path: str
    manifest_digest: str
    layer_start: int
    layer_end: int
    listen_hosts: tuple[str, ...]
    data_port: int
    n_ctx: int
    n_parallel: int
    n_threads: int
    n_gpu_layers: int
    cache_type_k: str
    cache_type_v: str
    flash_attention: bool | None
    log_format: Literal["pretty", "json"]
    log_verbosity: int
    sessions_per_node_max: int = SESSIONS_PER_NODE_MAX
    nice: int = 0  # how far it stands back behind the machine's other work, 0 to 19
    is_draining: bool = False  # it takes no sessions: what it was before it died
    vocabulary_path: str = ""  # for grammars; see `engine.base.EngineOptions`
    own_kernels: bool = True
    large_pages: bool = True
    following: tuple[NextStage, ...] = ()  # see `Following`


class Ready(_Message, frozen=True, tag="ready"):
    """The shard is loaded and the data port open."""

    data_port: int
    architecture: str
    n_ctx: int
    n_parallel: int
    fingerprint: str


class Failed(ErrorReport, frozen=True, tag="failed"):
    """The shard cannot be served; the data process ends."""


class Grant(_Message, frozen=True):
    """A LinkGrant as plain values."""

    link_id: bytes
    peer_id: str
    dialer_key: bytes
    dialer_iv: bytes
    acceptor_key: bytes
    acceptor_iv: bytes
    endpoints: tuple[Endpoint, ...]
    stream: Endpoint | None

    @classmethod
    def of(cls, grant: LinkGrant) -> Grant:
        outward, inward = grant.keys.dialer_to_acceptor, grant.keys.acceptor_to_dialer
        return cls(
            link_id=grant.link_id,
            peer_id=grant.peer_id,
            dialer_key=outward.key,
            dialer_iv=outward.iv,
            acceptor_key=inward.key,
            acceptor_iv=inward.iv,
            endpoints=grant.endpoints,
            stream=grant.stream,
        )

    def link_grant(self) -> LinkGrant:
        keys = LinkKeys(
            DirectionKey(self.dialer_key, self.dialer_iv),
            DirectionKey(self.acceptor_key, self.acceptor_iv),
        )
        return LinkGrant(self.link_id, keys, self.peer_id, self.endpoints, self.stream)


class ExpectLink(_Message, frozen=True, tag="expect"):
    """To the data process: this link was offered to somebody, who will dial."""

    grant: Grant


class CutOff(_Message, frozen=True, tag="cut"):
    """To the data process: these nodes are no members any more."""

    peer_ids: tuple[str, ...]


class Following(_Message, frozen=True, tag="following"):
    """To the data process: results may go to these nodes, so have links to them."""

    nodes: tuple[NextStage, ...]


class NeedLink(_Message, frozen=True, tag="need"):
    """To the control process: agree on a link with the next stage."""

    number: int
    peer_id: str
    addresses: tuple[str, ...]


class LinkAnswer(_Message, frozen=True, tag="answer"):
    """To the data process: the grant that was needed, or why there is none."""

    number: int
    grant: Grant | None
    failed: Failed | None


class AskMetrics(_Message, frozen=True, tag="ask_metrics"):
    """To the data process, answered by Metrics with the same number."""

    number: int


class LinkState(_Message, frozen=True):
    """A link that this process dialed."""

    peer_id: str
    kind: Literal["direct", "stream"]
    round_trip_us: int


class Metrics(_Message, frozen=True, tag="metrics"):
    number: int
    n_sessions: int
    memory_bytes: int
    counters: dict[str, int]
    links: tuple[LinkState, ...]


class SessionsHeld(_Message, frozen=True, tag="sessions"):
    """To the control process: the stage has another number of sessions than it told before."""

    n_sessions: int


class Drain(_Message, frozen=True, tag="drain"):
    """To the data process: take no further sessions, or take them again."""

    is_draining: bool


class Stop(_Message, frozen=True, tag="stop"):
    """To the data process: end the sessions with an error that says so, then exit."""


LocalMessage = (
    Start
    | Ready
    | Failed
    | ExpectLink
    | CutOff
    | Following
    | NeedLink
    | LinkAnswer
    | AskMetrics
    | Metrics
    | SessionsHeld
    | Drain
    | Stop
)


def failed_message(error: ShardmeshError) -> Failed:
    """An error as a message."""
    return Failed(**told(error))


class LocalChannel:
    """Messages over a pair of pipes; one task reads, any task writes."""

    def __init__(self, incoming: trio.abc.ReceiveStream, outgoing: trio.abc.SendStream) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._writing = trio.Lock()
        self._reader = RecordReader(LOCAL_MESSAGE_BYTES_MAX)
        self._records: list[bytes] = []

    async def send(self, message: LocalMessage) -> None:
        """Writes a whole message; raises UnreachableError (code PROCESS_GONE) if nobody reads.

        A message under way is not cut by a cancellation, only by a reader that hangs.
        """
        data = encode_cbor(message)
        async with self._writing:
            try:
                with trio.move_on_after(LOCAL_WRITE_TIMEOUT_S) as writing:
                    writing.shield = True
                    await self._outgoing.send_all(LENGTH.pack(len(data)) + data)
                if writing.cancelled_caught:  # half a message may be out: nothing can follow it
                    await trio.aclose_forcefully(self._outgoing)
                    raise _gone()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise _gone() from error

    async def receive(self) -> LocalMessage | None:
        """The next message, None at the end; raises ProtocolError for what is none."""
        while not self._records:
            data = await self._incoming.receive_some(READ_BYTES)
            if not data:
                return None
            self._records = self._reader.feed(data)
        message: LocalMessage = decode_cbor(self._records.pop(0), LocalMessage)  # type: ignore[arg-type]
        return message


def _gone() -> UnreachableError:
    return UnreachableError("the other process of this listener is gone", code=PROCESS_GONE)


def unexpected(message: LocalMessage) -> ProtocolError:
    """The error for a message that this side never gets."""
    return ProtocolError(f"{type(message).__name__} is not for this process")
