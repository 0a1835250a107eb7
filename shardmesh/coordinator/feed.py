"""What a session sends to its first stage: micro-batches of tokens, some of them guesses.

A guess is sent ahead of the result that will show whether it is right.  Once it is known to be
wrong, a new branch begins at its position; the stages drop what they made of it.  No clock, no
waiting; a link is written to in `resume`, `taken` and whatever adds a micro-batch.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Sequence

from shardmesh.errors import ProtocolError
from shardmesh.links.branches import Branches
from shardmesh.links.outgoing import Outgoing
from shardmesh.wire.draft_check import draft_check
from shardmesh.wire.limits import BRANCHES_TOLD_MAX, DRAFT_KEY_BYTES
from shardmesh.wire.messages import BatchDone, TokenBatch

TOKENS_KEPT_BYTES_MAX = 1 << 40
"""A coordinator keeps all token ids of a session: the context bounds them, and they are small."""


class Feed:
    """The micro-batches of one session, and the results that are due for them."""

    def __init__(self, session_id: bytes, n_vocab: int | None = None) -> None:
        """A result that names a token from `n_vocab` on is refused."""
        self.draft_key = secrets.token_bytes(DRAFT_KEY_BYTES)
        self.outgoing = Outgoing(0, n_bytes_max=TOKENS_KEPT_BYTES_MAX)
        self.n_sent = 0  # the next position
        self.n_done = 0  # positions whose results have come
        self.n_compared = 0  # of them, from the last stage that is there now
        self._given: dict[int, int | None] = {}  # the token sampled behind a position's micro-batch
        self._is_comparable = True
        self._session_id = session_id
        self._n_vocab = n_vocab
        self._due: deque[TokenBatch] = deque()  # sent, and no result has come
        self._guesses: deque[int] = deque()  # the last positions of what was sent
        self._branch = 0
        self._branches = Branches()
        self._starts: list[int] = []  # of all that was sent and stands
        self._n_unsampled: int | None = None

    @property
    def starts(self) -> Sequence[int]:
        """The positions where micro-batches begin, rising, and that of the next one."""
        return [*self._starts, self.n_sent]

    @property
    def n_unsampled(self) -> int:
        """Positions before the first micro-batch that asked for a token or an embedding."""
        return self.n_sent if self._n_unsampled is None else self._n_unsampled

    @property
    def guesses(self) -> Sequence[int]:
        """Tokens that were sent and are not known to be right, in order."""
        return self._guesses

    @property
    def branches(self) -> tuple[tuple[int, int], ...]:
        """The newest branches with their positions; no stage has missed more."""
        return self._branches.newest(BRANCHES_TOLD_MAX)

    def begin_behind(self, pieces: Iterable[Sequence[int]]) -> None:
        """All stages hold these already: kept for one that comes in the place of another."""
        self.outgoing = Outgoing(0, n_bytes_max=TOKENS_KEPT_BYTES_MAX)
        self.n_sent = 0
        self._starts.clear()
        for piece in pieces:
            self._keep(self._batch(piece, sample=False))
        self.n_done = self.n_compared = self.n_sent

    def add(
        self,
        tokens: Sequence[int],
        *,
        sample: bool,
        embed: bool,
        scored: Sequence[int] = (),
        hand: bool = False,
    ) -> None:
        """What comes next is known; raises what the link's `send` raises.

        If it was guessed it is on its way already.  With `hand` the last stage may send what it
        samples behind it to the first stage by itself; it is sent from here all the same.
        """
        if self._guesses:
            if list(tokens) == [self._guesses[0]] and sample and not (embed or scored):
                self._guesses.popleft()
                return
            self.take_back()
        self._send(self._batch(tokens, sample=sample, embed=embed, scored=scored, hand=hand))

    def guess(self, token: int) -> None:
        """Sends a guess of what comes next; raises what the link's `send` raises."""
        self._guesses.append(token)
        check = draft_check(self.draft_key, self.n_sent, token)
        self._send(self._batch([token], sample=True, check=check, hand=True))

    def take_back(self) -> None:
        """Drops the guesses; what is sent next takes their place on every stage."""
        if self._guesses:
            self.begin_branch()

    def begin_branch(self) -> None:
        """As `take_back`, and what the stages have behind them is dropped in any case."""
        self._branch += 1
        self.n_sent -= len(self._guesses)
        del self._starts[len(self._starts) - len(self._guesses) :]
        for _ in self._guesses:
            self._due.pop()
        self._guesses.clear()
        self._branches.begin(self._branch, self.n_sent)
        self.outgoing.forget_from(self.n_sent)

    def accept(self, done: BatchDone) -> None:
        """A result; raises ProtocolError (theirs) unless it is the one due, with known tokens."""
        asked = self._due[0] if len(self._due) > len(self._guesses) else None
        fits = (
            asked is not None
            and done.position == asked.position
            and done.n_tokens == len(asked.tokens)
            and asked.sample == (done.sampled is not None)
            and asked.scored == tuple(score.token for score in done.scores)
        )
        if not fits:
            raise ProtocolError("a result is not the one that was asked for")
        if self._n_vocab is not None and _highest_token(done) >= self._n_vocab:
            raise ProtocolError(f"a result names a token outside the vocabulary of {self._n_vocab}")
        self._due.popleft()
        self._given[done.position] = _token(done)
        self.n_done += done.n_tokens
        self.n_compared = self.n_done

    def begin_again(self) -> None:
        """Another last stage will compute all results again, which must be the same."""
        self.n_compared = 0 if self._is_comparable else self.n_done

    def compare_no_more(self) -> None:
        """Stages do not compute alike any more, so results that differ mean nothing."""
        self._is_comparable = False
        self.n_compared = self.n_done

    def results_from(self, kept_from: int) -> int:
        """From which position the last stage is to give results, which it keeps from `kept_from`.

        Those below `n_done` are only compared.
        """
        self.n_compared = min(self.n_done, max(self.n_compared, kept_from))
        return self.n_compared

    def is_again(self, done: BatchDone) -> bool:
        """Whether a result is of a position that had one before."""
        return done.position < self.n_done

    def compare(self, done: BatchDone) -> None:
        """A result that came before from another replica; raises ProtocolError (theirs)."""
        if done.position != self.n_compared:
            raise ProtocolError("a result is not the one that was asked for")
        if _token(done) != self._given.get(done.position):
            raise ProtocolError(
                "it computed the text again and got another token than there was",
                code="OTHER_TOKEN",
            )
        self.n_compared += done.n_tokens

    def _send(self, batch: TokenBatch) -> None:
        self._due.append(batch)
        self._keep(batch)

    def _keep(self, batch: TokenBatch) -> None:
        self._starts.append(batch.position)
        if self._n_unsampled is None and (batch.sample or batch.embed):
            self._n_unsampled = batch.position
        self.n_sent += len(batch.tokens)
        self.outgoing.add(batch.position, len(batch.tokens), batch)

    def _batch(
        self,
        tokens: Sequence[int],
        *,
        sample: bool,
        embed: bool = False,
        check: bytes = b"",
        scored: Sequence[int] = (),
        hand: bool = False,
    ) -> TokenBatch:
        return TokenBatch(
            session=self._session_id,
            epoch=0,  # `outgoing` puts in the one of the time when it is sent
            position=self.n_sent,
            tokens=tuple(tokens),
            sample=sample,
            embed=embed,
            branch=self._branch,
            check=check,
            scored=tuple(scored),
            hand=hand,
        )


def _token(done: BatchDone) -> int | None:
    return done.sampled.token if done.sampled is not None else None


def _highest_token(done: BatchDone) -> int:
    """Of those that a last stage may name by itself; -1 if there are none."""
    told = done.scores if done.sampled is None else (done.sampled, *done.scores)
    named = [token for each in told for token, _ in each.top_logprobs]
    return max([-1 if done.sampled is None else done.sampled.token, *named])
