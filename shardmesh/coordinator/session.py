"""A session over a chain: opened on every stage, fed with tokens, closed on every stage."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager

import trio

from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.errors import ProtocolError, ShardmeshError, UnreachableError, error_from_wire
from shardmesh.links.link import Link
from shardmesh.wire.limits import SESSION_BATCHES_WAITING_MAX
from shardmesh.wire.messages import (
    BatchDone,
    CloseSession,
    Message,
    NextStage,
    OpenSession,
    Sampling,
    SessionFailed,
    SessionOpened,
    TokenBatch,
)

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 15.0
"""From asking all stages to their answers; a stage may have to dial the next one first."""

STEP_TIMEOUT_S = 120.0
"""For one micro-batch through the chain; a dead stage is noticed much sooner by its link."""

N_BATCHES_IN_FLIGHT_MAX = 8
"""Micro-batches of a prompt under way at once: enough to keep all stages of a chain busy."""

INBOX_MESSAGES_MAX = 2 * SESSION_BATCHES_WAITING_MAX
"""Messages for a session that were not looked at yet; it never has so many micro-batches out."""

_RUN_AGAIN = "run the prompt again once `shardmesh status` says that the pipeline is complete"
_NEXT_LOST = ("LINK_LOST", "LINK_SILENT", "LINK_TIMEOUT")
"""Codes of links; a stage has one to the next stage, which it reports when it ends."""

Event = SessionOpened | BatchDone | SessionFailed | ShardmeshError


@dataclasses.dataclass(frozen=True)
class SessionSettings:
    """What a session needs from its chain."""

    n_ctx: int
    sampling: Sampling
    history: tuple[int, ...] = ()
    adapter: str = ""  # a LoRA adapter of the manifest


class SessionRouter:
    """Hands what comes over the links of a coordinator to the sessions it concerns."""

    def __init__(self) -> None:
        self._inboxes: dict[bytes, trio.MemorySendChannel[tuple[Link, Event]]] = {}
        self._links: dict[bytes, Sequence[Link]] = {}

    @property
    def n_sessions(self) -> int:
        return len(self._inboxes)

    def on_message(self, link: Link, message: Message, body: memoryview) -> None:
        """One message of a link; raises ProtocolError for one that coordinators do not get."""
        if not isinstance(message, SessionOpened | BatchDone | SessionFailed):
            raise ProtocolError(f"a coordinator gets no {type(message).__name__}")
        inbox = self._inboxes.get(message.session)
        if inbox is None or link not in self._links[message.session]:
            return  # a late word about a session that is over, or left this stage
        if inbox.statistics().current_buffer_used >= INBOX_MESSAGES_MAX:
            raise ProtocolError("a stage answers more than it was asked")
        inbox.send_nowait((link, message))

    def on_closed(self, link: Link, error: ShardmeshError) -> None:
        """Tells every session that used the link."""
        for session_id, links in list(self._links.items()):
            if link in links:
                # There is always room: each link has a place of its own for this.
                self._inboxes[session_id].send_nowait((link, error))

    @asynccontextmanager
    async def session(
        self, chain: Chain, links: Sequence[Link], settings: SessionSettings
    ) -> AsyncIterator[Session]:
        """An open session; closed on all stages at the end, whatever the end is.

        `links` are those to the chain's stages, in order.  Raises what a stage answered, or
        UnreachableError (the moment's) if one does not answer in time.
        """
        session_id = secrets.token_bytes(16)
        n_events_max = INBOX_MESSAGES_MAX + len(links)
        inbox, events = trio.open_memory_channel[tuple[Link, Event]](n_events_max)
        self._inboxes[session_id], self._links[session_id] = inbox, links
        session = Session(session_id, chain, links, events)
        try:
            await session.open(settings)
            yield session
        finally:
            del self._inboxes[session_id], self._links[session_id]
            for link in links:
                if link.is_open:
                    _send_close(link, session_id)


class Session:
    """One generation's KV on every stage of a chain."""

    def __init__(
        self,
        session_id: bytes,
        chain: Chain,
        links: Sequence[Link],
        events: trio.MemoryReceiveChannel[tuple[Link, Event]],
    ) -> None:
        self.session_id = session_id
        self.chain = chain
        self.n_sent = 0  # tokens sent so far: the next position
        self._links = links
        self._events = events
        self._epoch = 0

    @property
    def first_hop_us(self) -> int:
        """Half a round trip to the first stage."""
        return self._links[0].half_round_trip_us

    async def open(self, settings: SessionSettings) -> None:
        """Asks all stages at once and waits until all have a sequence for the session."""
        for number, link in enumerate(self._links):
            link.send(self._open_message(number, settings))
        waiting = set(range(len(self._links)))
        with _deadline(OPEN_TIMEOUT_S, "a stage did not open the session in time"):
            while waiting:
                link, event = await self._next_event()
                if isinstance(event, SessionOpened):
                    waiting.discard(self._links.index(link))

    def send(self, tokens: Sequence[int], *, sample: bool, embed: bool = False) -> None:
        """Sends a micro-batch to the first stage; raises what the link's `send` raises."""
        batch = TokenBatch(
            session=self.session_id,
            epoch=self._epoch,
            position=self.n_sent,
            tokens=tuple(tokens),
            sample=sample,
            embed=embed,
        )
        self._links[0].send(batch)
        self.n_sent += len(tokens)

    async def receive(self) -> BatchDone:
        """The next micro-batch that has gone through the chain.

        Raises the error of the stage that failed, or UnreachableError (the moment's) when nothing
        comes for STEP_TIMEOUT_S.
        """
        with _deadline(STEP_TIMEOUT_S, "the chain did not answer in time"):
            while True:
                link, event = await self._next_event()
                if isinstance(event, BatchDone):
                    if link is not self._links[-1]:
                        raise ProtocolError("a result came from another stage than the last")
                    return event

    async def _next_event(self) -> tuple[Link, SessionOpened | BatchDone]:
        """The next good news of the current epoch; bad news is raised."""
        while True:
            link, event = await self._events.receive()
            if isinstance(event, ShardmeshError):
                raise _stage_lost(self.chain, self._links.index(link), event)
            if event.epoch != self._epoch:
                continue
            if isinstance(event, SessionFailed):
                raise _stage_failed(event)
            return link, event

    def _open_message(self, number: int, settings: SessionSettings) -> OpenSession:
        stages = self.chain.stages
        stage, is_last = stages[number], number == len(stages) - 1
        return OpenSession(
            session=self.session_id,
            epoch=self._epoch,
            manifest_digest=stage.manifest_digest,
            layer_start=stage.layer_start,
            layer_end=stage.layer_end,
            n_ctx=settings.n_ctx,
            previous_stage=stages[number - 1].peer_id if number else None,
            next_stage=None if is_last else _next_stage(stages[number + 1]),
            sampling=settings.sampling if is_last else None,
            history=settings.history if is_last else (),
            adapter=settings.adapter,
        )


def _next_stage(replica: Replica) -> NextStage:
    return NextStage(peer_id=replica.peer_id, addresses=replica.addresses)


@contextmanager
def _deadline(timeout_s: float, sentence: str) -> Iterator[None]:
    try:
        with trio.fail_after(timeout_s):
            yield
    except trio.TooSlowError:
        raise UnreachableError(sentence, code="STAGE_TIMEOUT") from None


def _send_close(link: Link, session_id: bytes) -> None:
    try:
        link.send(CloseSession(session=session_id))
    except ShardmeshError as error:
        # A stage that cannot be told frees the session when its link ends, so end it.
        link.close(error)


def _stage_lost(chain: Chain, number: int, cause: ShardmeshError) -> UnreachableError:
    stage = chain.stages[number]
    return UnreachableError(
        f"the stage with layers [{stage.layer_start}, {stage.layer_end}) was lost: {cause}",
        code="STAGE_LOST",
        next_step=_RUN_AGAIN,
    )


def _stage_failed(event: SessionFailed) -> ShardmeshError:
    """What a stage reports of itself, or of its link to the next one."""
    layers = f"[{event.layer_start}, {event.layer_end})"
    if event.code in _NEXT_LOST:
        return UnreachableError(
            f"the stage behind layers {layers} was lost: {event.message}",
            code="STAGE_LOST",
            next_step=_RUN_AGAIN,
        )
    if event.blame == "moment" and not event.next_step:
        sentence = f"layers {layers}: {event.message}"
        return error_from_wire(event.code, event.blame, sentence, _RUN_AGAIN)
    return event.error()
