"""Where the time of a generation went, per stage and on the way.  Pure arithmetic.

Stages report what they waited and computed, by their own clocks.  The rest of a step, as the
coordinator's clock has it, was spent on the way: sockets, wires, waking up.  It is divided among
the hops in proportion to the round trips that heartbeats measured on their links, so that the
parts add up to the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shardmesh.wire.messages import StageTiming


@dataclasses.dataclass(frozen=True)
class StageTotal:
    """Sums of one stage over the decode phase, in milliseconds."""

    layer_start: int
    layer_end: int
    compute_ms: float
    queue_ms: float
    wire_ms: float  # the hop behind this stage


@dataclasses.dataclass(frozen=True)
class Timings:
    """A finished generation."""

    n_prompt_tokens: int
    n_reused_tokens: int  # of them, which the stages held already
    n_tokens: int
    first_token_s: float  # from the request to the first token
    total_s: float  # from the request to the last token
    decode_tokens_per_s: float | None  # None for fewer than two tokens
    first_hop_ms: float  # from the coordinator to the first stage, over the decode phase
    stages: tuple[StageTotal, ...]
    n_drafts: int = 0  # tokens that were guessed and sent ahead; then steps overlap
    n_drafts_right: int = 0
    n_handed: int = 0  # tokens that the last stage sent straight to the first


@dataclasses.dataclass(frozen=True)
class Step:
    """One decode step: its length and what its stages report."""

    elapsed_us: float
    first_hop_us: float
    stages: Sequence[StageTiming]


class StepClock:
    """Makes steps of the times at which results came.

    Where tokens go straight to the first stage, nobody waits for the coordinator.  A result that it
    takes late makes that step too long and the next one too short, at times shorter than what its
    stages computed; what is missing there is taken off the steps after it.
    """

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._owed_us = 0.0

    def step(self, now_s: float, stages: Sequence[StageTiming], first_hop_us: float) -> Step | None:
        """The step that ends now; None for the first token, which closes the prefill."""
        last_s, self._last_s = self._last_s, now_s
        if last_s is None:
            return None
        elapsed_us = (now_s - last_s) * 1e6 - self._owed_us
        busy_us = _busy_us(stages) if first_hop_us == 0 else 0
        self._owed_us = max(0.0, busy_us - elapsed_us)
        return Step(max(elapsed_us, busy_us, 0.0), first_hop_us, stages)


class TimingRecorder:
    """Collects what the results report while a generation runs; times come from the caller."""

    def __init__(self, n_prompt_tokens: int, started_s: float, *, n_reused: int = 0) -> None:
        self._n_prompt_tokens = n_prompt_tokens
        self._n_reused = n_reused
        self._started_s = started_s
        self._token_times_s: list[float] = []
        self._steps: list[Step] = []
        self._clock = StepClock()

    def token(self, now_s: float, stages: Sequence[StageTiming], first_hop_us: float) -> None:
        """One token came; the first one closes the prefill and is not a decode step.

        A step is left out if it does not name the stages of the steps before: stages may say
        anything.
        """
        step = self._clock.step(now_s, stages, first_hop_us)
        if step is not None and (not self._steps or _layers(step) == _layers(self._steps[0])):
            self._steps.append(step)
        self._token_times_s.append(now_s)

    def finish(self, now_s: float) -> Timings:
        """The sums so far."""
        times = self._token_times_s or [now_s]
        decode_s = times[-1] - times[0]
        n_decode = len(times) - 1
        hops_ms = _sum_columns([hops_of_step(s) for s in self._steps])
        return Timings(
            n_prompt_tokens=self._n_prompt_tokens,
            n_reused_tokens=self._n_reused,
            n_tokens=len(self._token_times_s),
            first_token_s=times[0] - self._started_s,
            total_s=times[-1] - self._started_s,
            decode_tokens_per_s=n_decode / decode_s if n_decode and decode_s > 0 else None,
            first_hop_ms=hops_ms[0] if hops_ms else 0.0,
            stages=self._stage_totals(hops_ms[1:]),
        )

    def _stage_totals(self, hops_ms: Sequence[float]) -> tuple[StageTotal, ...]:
        columns = list(zip(*(step.stages for step in self._steps), strict=True))
        return tuple(
            StageTotal(
                layer_start=column[0].layer_start,
                layer_end=column[0].layer_end,
                compute_ms=sum(t.compute_us for t in column) / 1e3,
                queue_ms=sum(t.queue_us for t in column) / 1e3,
                wire_ms=hop_ms,
            )
            for column, hop_ms in zip(columns, hops_ms, strict=True)
        )


def hops_of_step(step: Step) -> list[float]:
    """Milliseconds of each hop of a step, the one to the first stage first."""
    way_us = max(0.0, step.elapsed_us - _busy_us(step.stages))
    weights = [step.first_hop_us, *(t.next_hop_us for t in step.stages)]
    if not any(weights):
        weights = [1.0] * len(weights)  # no heartbeat has come back yet
    return [way_us * weight / sum(weights) / 1e3 for weight in weights]


def _layers(step: Step) -> list[tuple[int, int]]:
    return [(timing.layer_start, timing.layer_end) for timing in step.stages]


def _busy_us(stages: Sequence[StageTiming]) -> int:
    return sum(t.compute_us + t.queue_us for t in stages)


def _sum_columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]
