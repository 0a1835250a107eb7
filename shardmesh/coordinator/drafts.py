"""How many tokens to guess ahead, and which.  Pure: times come from the results.

A guess that is right saves waiting for the result before it; one that is wrong costs each stage but
the last the time of a row, in which it could have served others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from shardmesh.coordinator.lookup import LookUp
from shardmesh.errors import InputError
from shardmesh.wire.limits import DRAFTS_MAX
from shardmesh.wire.messages import StageTiming

AUTO = None
"""As many guesses as pay; else a number, wherever there is something to guess by."""

RATE_WEIGHT = 0.1
"""Of a new token in the share of guesses that come true."""

STEP_WEIGHT = 0.3
"""Of a new step in the time of one."""

LENGTHS_APART = 4
"""Guesses by matches of 1 to 4 tokens, or more, are counted apart: long ones come true more."""


def parse_drafts(text: str) -> int | None:
    """The number that an option names, or AUTO; raises InputError (theirs)."""
    if text in ("auto", "off"):
        return AUTO if text == "auto" else 0
    if text.isascii() and text.isdigit() and 1 <= int(text) <= DRAFTS_MAX:
        return int(text)
    raise InputError(
        f"--drafts is auto, off or 1 to {DRAFTS_MAX}, not {text[:40]!r}",
        next_step="leave it out: auto guesses as many as pay",
    )


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What one token costs when none is guessed."""

    step_us: float  # from sending a token to the result
    stage_us: float  # of these in the stage that takes longest, waiting included


def step_cost(stages: Sequence[StageTiming], first_hop_us: float) -> StepCost:
    """By what the stages report of a token before which nothing of its session was under way."""
    busy_us = [stage.queue_us + stage.compute_us for stage in stages]
    way_us = first_hop_us + sum(stage.next_hop_us for stage in stages)
    return StepCost(way_us + sum(busy_us), max(busy_us))


def drafts_worth(chance: float, cost: StepCost) -> int:
    """How many guesses in a row to have under way if each comes true with this chance.

    The n-th comes true with all before it, by `chance ** n`.  Then the step is saved that waiting
    for it would take, but for the time of a row in the slowest stage; else that time is lost.  More
    than keep the slowest stage busy for a whole step save nothing.
    """
    if cost.step_us <= 0 or cost.stage_us <= 0:
        return 0
    share = cost.stage_us / cost.step_us
    n_useful = min(DRAFTS_MAX, math.ceil(1 / share) - 1)
    n_worth, all_right = 0, chance
    while n_worth < n_useful and all_right > share:
        n_worth += 1
        all_right *= chance
    return n_worth


class Fed(Protocol):
    """What tokens and guesses are sent with: a session."""

    @property
    def guesses(self) -> Sequence[int]: ...

    def send(self, tokens: Sequence[int], *, sample: bool, hand: bool) -> None: ...

    def guess(self, token: int) -> None: ...


Ask = Callable[[Sequence[int], int, Callable[[int], None]], None]
"""Has a draft model guess so many tokens behind a text.

Each comes back by itself, on the loop, until something else is asked."""

BY_MODEL = 0
"""Its place among the lengths of matches."""


class Drafter:
    """The guesses of one generation."""

    def __init__(
        self,
        n_drafts: int | None,
        tokens: Sequence[int],
        is_end: Callable[[int], bool],
        ask_model: Ask | None = None,
    ) -> None:
        """`tokens` are the prompt; behind a token that `is_end` nothing is guessed."""
        self.n_guessed = 0  # how many were sent
        self.n_right = 0  # and were what came
        self._n_fixed = n_drafts
        self._lookup = LookUp(tokens) if n_drafts != 0 else None
        self._is_end = is_end
        self._ask_model = ask_model
        self._text = list(tokens) if ask_model else []
        self._turn = 0
        self._expected: dict[int, int] = {}  # by length of match: what it says, sent or not
        self._rates: dict[int, float] = {}  # by the same: how often that came true
        self._cost: StepCost | None = None
        self._is_alone = False

    def note(self, token: int, stages: Sequence[StageTiming], first_hop_us: float) -> None:
        """What came; it also shows what guesses are worth, sent or not."""
        if self._lookup is None:
            return
        if self._is_alone and stages:
            self._note_cost(step_cost(stages, first_hop_us))
        for length, expected in self._expected.items():
            rate = self._rate(length)
            self._rates[length] = rate + RATE_WEIGHT * ((token == expected) - rate)
        self._lookup.add(token)
        if self._ask_model:
            self._text.append(token)
        guessed = self._lookup.guess(1)
        self._expected = {self._length: guessed[0]} if guessed else {}

    def go_on(self, session: Fed, token: int, n_left: int) -> None:
        """Sends a token that came and guesses behind it; `n_left` tokens are still wanted."""
        self._turn += 1
        self._is_alone = not (session.guesses and session.guesses[0] == token)
        self.n_right += not self._is_alone
        session.send([token], sample=True, hand=True)
        if self._lookup is None:
            return
        is_model_better = self._ask_model and self._rate(BY_MODEL) > self._rate(self._length)
        if self._lookup.n_matched and not is_model_better:
            for guess in self._more(session.guesses, n_left - 1):
                if self._is_end(guess):
                    break
                self._send(session, guess)
        elif self._ask_model:
            self._begin_asking(self._ask_model, session, n_left - 1)

    def _more(self, under_way: Sequence[int], n_max: int) -> list[int]:
        if self._lookup is None:
            return []
        n_wanted = min(n_max, self._n_wanted(self._length))
        guesses = self._lookup.guess(n_wanted) if n_wanted > len(under_way) else []
        if guesses[: len(under_way)] != list(under_way):
            return []  # what is under way will show how it goes on
        return guesses[len(under_way) :]

    def _begin_asking(self, ask: Ask, session: Fed, n_max: int) -> None:
        """Has the model guess behind what is under way; one token at least, to see its worth."""
        turn, under_way = self._turn, list(session.guesses)
        n_wanted = min(n_max, self._n_wanted(BY_MODEL))

        def take(token: int) -> None:
            if turn != self._turn or list(session.guesses) != under_way:
                return  # the text went on, or a repair dropped the guesses
            if not under_way:
                self._expected[BY_MODEL] = token
            if len(under_way) < n_wanted and not self._is_end(token):
                self._send(session, token)
                under_way.append(token)

        if under_way:
            self._expected[BY_MODEL] = under_way[0]
        ask([*self._text, *under_way], max(n_wanted - len(under_way), not under_way), take)

    def _send(self, session: Fed, token: int) -> None:
        session.guess(token)
        self.n_guessed += 1

    def _n_wanted(self, length: int) -> int:
        if self._n_fixed is not None:
            return self._n_fixed
        return drafts_worth(self._rate(length), self._cost) if self._cost is not None else 0

    def _note_cost(self, cost: StepCost) -> None:
        known = self._cost or cost
        self._cost = StepCost(
            known.step_us + STEP_WEIGHT * (cost.step_us - known.step_us),
            known.stage_us + STEP_WEIGHT * (cost.stage_us - known.stage_us),
        )

    @property
    def _length(self) -> int:
        n_matched = self._lookup.n_matched if self._lookup is not None else 0
        return min(n_matched, LENGTHS_APART + 1)

    def _rate(self, length: int) -> float:
        """How often guesses by matches of this length came true; a half before there was one."""
        return self._rates.get(length, 0.5)
