"""Going on with a text whose coordinator died, from the tokens that it gave.

The tokens are computed again one by one, as they were the first time, and the last stage samples
behind each: so its sampler, random numbers, penalties and grammar included, arrives in the state
that it had.  What it samples must be the tokens that were given; then what follows is what would
have followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from shardmesh.coordinator.session import N_BATCHES_IN_FLIGHT_MAX, Session
from shardmesh.coordinator.stops import StopScanner
from shardmesh.errors import InputError
from shardmesh.wire.messages import BatchDone


class _TextSource(Protocol):
    def piece(self, token: int) -> bytes: ...

    def is_end(self, token: int) -> bool: ...


class _Decoder(Protocol):
    def feed(self, piece: bytes) -> str: ...


def reread(
    given: Sequence[int],
    *,
    source: _TextSource,
    decoder: _Decoder,
    stops: StopScanner,
    ignore_end: bool,
) -> bool:
    """Brings decoder and stop strings where they were behind these tokens, whose text is known.

    Says whether the text was over by then.  Raises InputError (theirs) for tokens that go on behind
    an end.
    """
    for number, token in enumerate(given, 1):
        is_over = source.is_end(token) and not ignore_end
        if not is_over:
            is_over = stops.feed(decoder.feed(source.piece(token)))[1]
        if is_over and number < len(given):
            raise InputError("the tokens to go on from go on behind the end of their text")
        if is_over:
            return True
    return False


async def catch_up(session: Session, given: Sequence[int], done: BatchDone) -> BatchDone:
    """Computes tokens again behind the prompt, whose result is `done`; the result of the last.

    Several are under way at once.  Raises what the session raises, and InputError (theirs,
    CANNOT_RESUME) at the first token that the last stage samples otherwise.
    """
    n_sent = 0
    for number, token in enumerate(given):
        _check(number, token, done)
        while n_sent < len(given) and n_sent - number < N_BATCHES_IN_FLIGHT_MAX:
            session.send([given[n_sent]], sample=True)
            n_sent += 1
        done = await session.receive()
    return done


def _check(number: int, given: int, done: BatchDone) -> None:
    if done.sampled is None or done.sampled.token != given:
        raise InputError(
            f"token {number + 1} of those to go on from is not what this request gives here",
            code="CANNOT_RESUME",
            next_step="give the prompt, the sampling settings and the seed of the first time; if "
            "they are, the mesh computes with another engine now: put the tokens behind the prompt "
            "instead, and another text may follow",
        )
