"""Tokens and text out of an open session."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

import trio

from shardmesh.coordinator.drafts import Ask, Drafter
from shardmesh.coordinator.pieces import pieces_of
from shardmesh.coordinator.resume import catch_up, reread
from shardmesh.coordinator.session import N_BATCHES_IN_FLIGHT_MAX, Session
from shardmesh.coordinator.stops import StopScanner
from shardmesh.coordinator.timings import TimingRecorder, Timings
from shardmesh.errors import ProtocolError
from shardmesh.wire.limits import SCORED_TOKENS_MAX
from shardmesh.wire.messages import BatchDone, Sampled, StageTiming

FinishReason = Literal["stop", "length"]


class TextSource(Protocol):
    """What turns tokens into text: `engine.tokenizer.Tokenizer`."""

    def piece(self, token: int) -> bytes: ...

    def is_end(self, token: int) -> bool: ...


class Decoder(Protocol):
    """What turns bytes into characters, never cutting one: `engine.text.TextDecoder`."""

    def feed(self, piece: bytes) -> str: ...

    def finish(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text that became certain, and the token that made it so (None at the very end)."""

    text: str
    token: Sampled | None
    stages: Sequence[StageTiming] = ()  # where the token's micro-batch spent its time
    first_hop_us: float = 0.0


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a generation."""

    reason: FinishReason
    timings: Timings


async def prefill(
    session: Session,
    tokens: Sequence[int],
    scores: list[Sampled] | None = None,
    *,
    hand: bool = False,
) -> BatchDone:
    """Sends a prompt in pieces, several under way at once; the result of the last one.

    What the session holds already is left out.  `scores` is filled with how likely each token is
    that stands behind a token which was sent here; then no piece is longer than what one answer has
    scores for.  `hand` is for the token behind the prompt, as in the session's `send`.  Raises what
    the session's `send` and `receive` raise.
    """

    async def receive() -> BatchDone:
        done = await session.receive()
        if scores is not None:
            scores.extend(done.scores)
        return done

    piece_tokens = session.piece_tokens
    if scores is not None:
        piece_tokens = min(piece_tokens, SCORED_TOKENS_MAX)
    pieces = list(pieces_of(tokens, piece_tokens, session.n_sent))
    n_in_flight = 0
    for number, piece in enumerate(pieces):
        if n_in_flight == N_BATCHES_IN_FLIGHT_MAX:
            await receive()
            n_in_flight -= 1
        behind = session.n_sent + 1
        scored = () if scores is None else tokens[behind : behind + len(piece)]
        is_last = number == len(pieces) - 1
        session.send(piece, sample=is_last, scored=scored, hand=is_last and hand)
        n_in_flight += 1
    for _ in range(n_in_flight - 1):
        await receive()
    return await receive()


async def generate(
    session: Session,
    prompt: Sequence[int],
    *,
    n_tokens_max: int,
    source: TextSource,
    decoder: Decoder,
    stops: StopScanner,
    ignore_end: bool = False,
    given: Sequence[int] = (),
    n_drafts: int | None = 0,
    ask_model: Ask | None = None,
    scores: list[Sampled] | None = None,
    started_s: float | None = None,
) -> AsyncGenerator[Piece | Finished, None]:
    """The text that follows a prompt, as it comes; a Finished is the last item.

    Of a text that was begun elsewhere, `given` are the tokens so far, and what comes is the rest.
    `n_drafts` tokens are guessed ahead at most, or as many as pay (None).
    `ask_model` has a draft model guess where the text says nothing.
    `scores` is filled with how likely the prompt's tokens are, before the first item comes.
    Raises what the session raises.  Leaves the session open, with the prompt and the tokens so far;
    left early, it may be computing the last one.
    """
    now_s = trio.current_time()
    recorder = TimingRecorder(
        len(prompt), now_s if started_s is None else started_s, n_reused=session.n_reused
    )
    if reread(given, source=source, decoder=decoder, stops=stops, ignore_end=ignore_end):
        yield Finished("stop", recorder.finish(now_s))
        return
    drafter = Drafter(
        n_drafts,
        [*prompt, *given],
        lambda token: source.is_end(token) and not ignore_end,
        ask_model,
    )

    def finish() -> Timings:
        timings = recorder.finish(trio.current_time())
        return dataclasses.replace(
            timings,
            n_drafts=drafter.n_guessed,
            n_drafts_right=drafter.n_right,
            n_handed=session.n_handed,
        )

    done = await catch_up(session, given, await prefill(session, prompt, scores, hand=not given))
    reason: FinishReason = "length"
    for n_so_far in range(len(given) + 1, n_tokens_max + 1):
        sampled = done.sampled
        if sampled is None:
            raise ProtocolError("the last stage sampled no token")
        recorder.token(trio.current_time(), done.timings, session.first_hop_us)
        drafter.note(sampled.token, done.timings, session.first_hop_us)
        if source.is_end(sampled.token) and not ignore_end:
            reason = "stop"
            break
        text, is_stopped = stops.feed(decoder.feed(source.piece(sampled.token)))
        goes_on = not is_stopped and n_so_far < n_tokens_max
        if goes_on:  # before the piece is looked at, which takes time too
            drafter.go_on(session, sampled.token, n_tokens_max - n_so_far)
        yield Piece(text, sampled, done.timings, session.first_hop_us)
        if is_stopped:
            yield Finished("stop", finish())
            return
        if goes_on:
            done = await session.receive()
    text, is_stopped = stops.feed(decoder.finish())
    yield Piece(text if is_stopped else text + stops.flush(), None)
    yield Finished(reason, finish())
