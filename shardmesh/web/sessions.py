"""The sessions of this gateway as they are shown: over which replicas, how fast, and where a
token's time goes.

Sums only: a session costs the same whether it writes ten tokens or ten thousand.  No text and no
token is kept here.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Final, Protocol

from shardmesh.coordinator.chain import Chain
from shardmesh.coordinator.coordinator import Completion
from shardmesh.coordinator.generate import Finished, Piece
from shardmesh.coordinator.repairs import Repair
from shardmesh.coordinator.timings import Step, StepClock, hops_of_step
from shardmesh.errors import ShardmeshError
from shardmesh.wire.messages import StageTiming

SESSIONS_FINISHED_MAX: Final = 20
"""Sessions shown after their end; enough to compare, few enough to be sent whole."""

REPAIRS_SHOWN_MAX: Final = 8
"""Of one session; a session that loses more stages has other troubles."""

RATE_WINDOW_S: Final = 1.0
"""Tokens per second are those of the last whole windows: steady to the eye."""

Json = dict[str, Any]


class OnChange(Protocol):
    """Whoever wants to know that sessions have changed."""

    def __call__(self, *, is_new_work: bool) -> None: ...


@dataclasses.dataclass
class _StageSums:
    """One stage over the decode steps so far, in microseconds."""

    layer_start: int
    layer_end: int
    queue_us: float = 0.0
    compute_us: float = 0.0
    wire_us: float = 0.0


OnRepair = Callable[["LiveSession", Repair], None]
OnStep = Callable[[str, Sequence[str], Step, Sequence[float]], None]
"""Takes model, peer ids of the chain, a decode step and its hops in milliseconds."""


class LiveSession:
    """One session from its chain to its end; made by `SessionBoard.start`."""

    def __init__(
        self,
        session_id: str,
        chain: Chain,
        n_prompt_tokens: int,
        clock: Callable[[], float],
        on_change: OnChange,
        *,
        started_s: float,
        wall_started_s: float,
        on_step: Sequence[OnStep] = (),
    ) -> None:
        self.session_id = session_id
        self.state = "running"
        self.chain = chain
        self.n_repairs = 0
        self.repairs: list[Repair] = []
        self._n_prompt_tokens = n_prompt_tokens
        self._clock = clock
        self._on_change = on_change
        self._on_step = on_step
        self._started_s = started_s
        self._wall_started_s = wall_started_s
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None
        self._steps = StepClock()
        self._n_tokens = 0
        self._n_steps = 0
        self._first_hop_us = 0.0
        self._stages: list[_StageSums] = []
        self._recent: collections.deque[float] = collections.deque(maxlen=4096)
        self._error = ""

    @property
    def is_running(self) -> bool:
        return self.state == "running"

    @property
    def first_token_s(self) -> float | None:
        """Seconds from the request to the first token."""
        return None if self._first_token_s is None else self._first_token_s - self._started_s

    def token(self, stages: Sequence[StageTiming], first_hop_us: float) -> None:
        """One token came; the first one ends the prefill and is not a decode step."""
        now_s = self._clock()
        step = self._steps.step(now_s, stages, first_hop_us)
        if step is None:
            self._first_token_s = now_s
        elif stages:
            self._add(step)
        self._last_token_s = now_s
        self._n_tokens += 1
        self._recent.append(now_s)
        self._on_change(is_new_work=False)

    def repaired(self, chain: Chain, repair: Repair) -> None:
        """Another chain carries the session from now on: a stage was replaced."""
        self.chain = chain
        self.repairs = [*self.repairs, repair][-REPAIRS_SHOWN_MAX:]
        self.n_repairs += 1
        self._on_change(is_new_work=True)

    def finish(self, reason: str) -> None:
        """The end: `stop`, `length`, `cancelled` or `failed`; only the first one counts."""
        if self.is_running:
            self.state = reason
            self._on_change(is_new_work=True)

    def fail(self, code: str, sentence: str) -> None:
        """The end by an error."""
        self._error = f"{sentence} [{code}]"
        self.finish("failed")

    def document(self) -> Json:
        """What is shown of it; times in milliseconds are means of one decode step."""
        first_s = self.first_token_s
        n_steps = max(1, self._n_steps)
        shown: Json = {
            "state": self.state,
            "phase": "prefill" if self._first_token_s is None else "decode",
            "model": self.chain.stages[0].model_name,
            "chain": [stage.peer_id for stage in self.chain.stages],
            "started_at_s": round(self._wall_started_s, 3),
            "n_prompt_tokens": self._n_prompt_tokens,
            "n_tokens": self._n_tokens,
            "n_repairs": self.n_repairs,
            "repairs": [repair_json(repair) for repair in self.repairs],
            "first_hop_ms": _ms(self._first_hop_us / n_steps),
            "stages": [
                {
                    "layer_start": stage.layer_start,
                    "layer_end": stage.layer_end,
                    "queue_ms": _ms(stage.queue_us / n_steps),
                    "compute_ms": _ms(stage.compute_us / n_steps),
                    "wire_ms": _ms(stage.wire_us / n_steps),
                }
                for stage in self._stages
            ],
        }
        if first_s is not None:
            shown["first_token_ms"] = round(first_s * 1e3, 1)
        if (rate := self._tokens_per_s()) is not None:
            shown["tokens_per_s"] = round(rate, 1)
        if self._error:
            shown["error"] = self._error
        return shown

    def _add(self, step: Step) -> None:
        ranges = [(t.layer_start, t.layer_end) for t in step.stages]
        if ranges != [(s.layer_start, s.layer_end) for s in self._stages]:  # first, or a new chain
            self._stages = [_StageSums(start, end) for start, end in ranges]
            self._n_steps, self._first_hop_us = 0, 0.0
        hops_ms = hops_of_step(step)
        self._n_steps += 1
        self._first_hop_us += hops_ms[0] * 1e3
        for sums, timing, hop_ms in zip(self._stages, step.stages, hops_ms[1:], strict=True):
            sums.queue_us += timing.queue_us
            sums.compute_us += timing.compute_us
            sums.wire_us += hop_ms * 1e3
        model_name = self.chain.stages[0].model_name
        for tell in self._on_step:
            tell(model_name, [stage.peer_id for stage in self.chain.stages], step, hops_ms)

    def _tokens_per_s(self) -> float | None:
        """Of the last window while it runs, of the whole decode phase afterwards.

        0 while nothing comes, for instance because a stage was lost.
        """
        if self._first_token_s is None or self._last_token_s is None or self._n_tokens < 2:
            return None
        if not self.is_running:
            decode_s = self._last_token_s - self._first_token_s
            return (self._n_tokens - 1) / decode_s if decode_s > 0 else None
        since_s = self._last_token_s - RATE_WINDOW_S
        window = [time_s for time_s in self._recent if time_s >= since_s]
        if len(window) < 2:  # a token takes longer than the window
            window = [self._recent[-2], self._recent[-1]]
        mean_s = (window[-1] - window[0]) / (len(window) - 1)
        if self._clock() - self._last_token_s > max(RATE_WINDOW_S, 2 * mean_s):
            return 0.0
        return 1 / mean_s if mean_s > 0 else None


class SessionBoard:
    """All running sessions of this gateway and the last finished ones."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.n_tokens = 0  # of all sessions since the start
        self._clock = clock
        self._wall_clock = wall_clock
        self._sessions: dict[str, LiveSession] = {}
        self._on_change: list[OnChange] = []
        self._on_repair: list[OnRepair] = []
        self._on_step: list[OnStep] = []

    def tell_steps(self, on_step: OnStep) -> None:
        """Calls this for every token behind the first of a session."""
        self._on_step.append(on_step)

    def tell_repairs(self, on_repair: OnRepair) -> None:
        """Calls this for every stage that is replaced in a running session."""
        self._on_repair.append(on_repair)

    def tell(self, on_change: OnChange) -> None:
        """Calls this after every change; `is_new_work`: one began, moved or ended."""
        self._on_change.append(on_change)

    def start(
        self,
        session_id: str,
        chain: Chain,
        n_prompt_tokens: int,
        *,
        started_s: float | None = None,
    ) -> LiveSession:
        """A new running session; `started_s` is when its request came, default now."""
        now_s = self._clock()
        started_s = now_s if started_s is None else started_s
        session = LiveSession(
            session_id,
            chain,
            n_prompt_tokens,
            self._clock,
            self._changed,
            started_s=started_s,
            wall_started_s=self._wall_clock() - (now_s - started_s),
            on_step=self._on_step,
        )
        self._sessions[session_id] = session
        self._changed(is_new_work=True)
        return session

    async def follow(
        self, session_id: str, completion: Completion, *, started_s: float | None = None
    ) -> AsyncGenerator[Piece | Finished, None]:
        """The items of a completion as they come, shown under this id meanwhile.

        Raises what the items raise; left early, the session counts as cancelled.
        """
        session = self.start(
            session_id, completion.chain, completion.n_prompt_tokens, started_s=started_s
        )
        try:
            async for item in completion.items:
                if isinstance(item, Finished):
                    session.finish(item.reason)
                elif item.token is not None:
                    session.token(item.stages, item.first_hop_us)
                    self.n_tokens += 1
                self._take_repairs(session, completion)
                yield item
        except ShardmeshError as error:
            session.fail(error.code, str(error))
            raise
        finally:
            session.finish("cancelled")

    def _take_repairs(self, session: LiveSession, completion: Completion) -> None:
        for repair in completion.repairs[session.n_repairs :]:
            session.repaired(completion.chain, repair)
            for tell in self._on_repair:
                tell(session, repair)

    def get(self, session_id: str) -> LiveSession | None:
        return self._sessions.get(session_id)

    def n_running_on(self, peer_id: str) -> int:
        """Running sessions whose chain goes over this node."""
        return sum(
            1
            for session in self._sessions.values()
            if session.is_running and any(s.peer_id == peer_id for s in session.chain.stages)
        )

    def document(self) -> dict[str, Json]:
        """What is shown of all of them, by session id."""
        return {key: session.document() for key, session in self._sessions.items()}

    def _changed(self, *, is_new_work: bool) -> None:
        if is_new_work:
            finished = [key for key, session in self._sessions.items() if not session.is_running]
            for key in finished[: max(0, len(finished) - SESSIONS_FINISHED_MAX)]:
                del self._sessions[key]
        for tell in self._on_change:
            tell(is_new_work=is_new_work)


def repair_json(repair: Repair) -> Json:
    """A replaced stage as events and pages tell of it."""
    return {
        "layer_start": repair.layer_start,
        "layer_end": repair.layer_end,
        "code": repair.code,
        "reason": repair.reason,
        "lost_peer_id": repair.lost_peer_id,
        "new_peer_id": repair.new_peer_id,
        "pause_ms": round(repair.pause_s * 1e3, 1),
    }


def _ms(us: float) -> float:
    return round(us / 1e3, 3)
