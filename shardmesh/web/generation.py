"""Running one choice of a request: its turn, its session, its pieces, its record."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import trio

from shardmesh.coordinator.chain import choose_model
from shardmesh.coordinator.coordinator import Completion, replica_of
from shardmesh.coordinator.generate import Finished, Piece
from shardmesh.coordinator.repairs import Repair
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.coordinator.timings import Timings
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import BusyError, ShardmeshError
from shardmesh.web.gateway import Gateway
from shardmesh.web.queue import capacity
from shardmesh.wire.limits import REQUEST_QUEUE_TIMEOUT_S

_BUSY_PAUSE_S = 0.1
"""Before a chain that is full of others' sessions is asked again; it doubles up to the maximum."""

_BUSY_PAUSE_MAX_S = 2.0

OnPiece = Callable[[Piece, Tokenizer], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished choice."""

    reason: str  # "stop" or "length"
    n_prompt_tokens: int
    n_tokens: int
    timings: Timings
    peer_ids: tuple[str, ...]  # of the chain's stages, as it was in the end
    repairs: tuple[Repair, ...] = ()  # stages that were replaced meanwhile


def new_id(prefix: str) -> str:
    """An id for an answer, such as `chatcmpl-...`."""
    return f"{prefix}-{secrets.token_hex(12)}"


async def run_choice(
    gateway: Gateway,
    request: CompletionRequest,
    *,
    answer_id: str,
    number: int,
    priority: int,
    on_start: Callable[[Completion], Awaitable[None]],
    on_piece: OnPiece,
) -> Outcome:
    """Generates one choice when its turn has come; `on_start` is called once it has its session.

    Raises what the coordinator raises, and BusyError (the moment's) if its turn does not come.
    Cancelled, it closes its session on all stages at once.
    """
    run = _Run(gateway, request, answer_id, number)
    began_s = trio.current_time()
    try:
        outcome = await _when_there_is_room(run, priority, on_start, on_piece)
    except trio.Cancelled:
        run.ended("cancelled", trio.current_time() - began_s)
        raise
    except ShardmeshError as error:
        run.ended("failed", trio.current_time() - began_s, cause=f"[{error.code}] {error}")
        gateway.metrics.failed(run.model_name, error.code)
        raise
    run.finished(outcome)
    return outcome


async def _when_there_is_room(
    run: _Run,
    priority: int,
    on_start: Callable[[Completion], Awaitable[None]],
    on_piece: OnPiece,
) -> Outcome:
    """Others use the mesh too: a stage may be full although the gateway has a place."""
    deadline_s = trio.current_time() + REQUEST_QUEUE_TIMEOUT_S
    pause_s = _BUSY_PAUSE_S
    async with run.gateway.queue_of(run.model_name).place(run.n_places(), priority):
        while True:
            try:
                return await run.generate(on_start, on_piece)
            except BusyError:
                if run.has_started or trio.current_time() + pause_s > deadline_s:
                    raise
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _BUSY_PAUSE_MAX_S)


class _Run:
    """One choice while it runs, and what is told of it."""

    def __init__(
        self, gateway: Gateway, request: CompletionRequest, answer_id: str, number: int
    ) -> None:
        self.gateway = gateway
        self.has_started = False
        self._replicas = choose_model(
            [replica_of(a) for a in gateway.directory.all()], request.model
        )
        self.model_name = self._replicas[0].model_name
        self._request = dataclasses.replace(
            request,
            model=self.model_name,
            wire=gateway.options.wire,
            n_drafts=gateway.options.n_drafts,
            reuse_prefix=gateway.options.reuse_prefix,
            standby=gateway.options.standby,
        )
        self.session_id = answer_id if number == 0 else f"{answer_id}-{number}"
        self._known: dict[str, Any] = {
            "session_id": self.session_id,
            "model_name": self.model_name,
        }
        self._asked_s = time.monotonic()
        self._n_tokens = 0

    def n_places(self) -> int:
        """Sessions that the stages can hold now."""
        n_parallel = {a.peer_id: a.capabilities.n_parallel for a in self.gateway.directory.all()}
        return capacity(self._replicas, n_parallel)

    async def generate(
        self, on_start: Callable[[Completion], Awaitable[None]], on_piece: OnPiece
    ) -> Outcome:
        async with self.gateway.coordinator.complete(self._request) as completion:
            self.has_started = True
            self._tell_start(completion)
            try:
                await on_start(completion)
                finished = await self._pass_on(completion, on_piece)
            finally:
                self.gateway.metrics.left(self.model_name)
            if finished is None:
                raise BusyError("the generation ended without an end")
            return Outcome(
                reason=finished.reason,
                n_prompt_tokens=completion.n_prompt_tokens,
                n_tokens=finished.timings.n_tokens,
                timings=finished.timings,
                peer_ids=tuple(stage.peer_id for stage in completion.chain.stages),
                repairs=tuple(completion.repairs),
            )

    async def _pass_on(self, completion: Completion, on_piece: OnPiece) -> Finished | None:
        finished: Finished | None = None
        started_s = self._asked_s
        shown = self.gateway.sessions.follow(self.session_id, completion, started_s=started_s)
        async with aclosing(shown) as items:
            async for item in items:
                if isinstance(item, Piece):
                    self._tell_token(item)
                    await on_piece(item, completion.tokenizer)
                else:
                    finished = item
        return finished

    def _tell_start(self, completion: Completion) -> None:
        stages = [
            {"peer_id": s.peer_id, "layer_start": s.layer_start, "layer_end": s.layer_end}
            for s in completion.chain.stages
        ]
        data = {**self._known, "n_prompt_tokens": completion.n_prompt_tokens, "stages": stages}
        self.gateway.events.publish("request.started", is_lasting=False, data=data)
        self.gateway.metrics.started(self.model_name)

    def _tell_token(self, piece: Piece) -> None:
        if piece.token is None:
            return
        self._n_tokens += 1
        self.gateway.metrics.token(self.model_name)

    def finished(self, outcome: Outcome) -> None:
        """Tells of a choice that came to its end."""
        data = {
            **self._known,
            "reason": outcome.reason,
            "n_prompt_tokens": outcome.n_prompt_tokens,
            "n_tokens": outcome.n_tokens,
            **timings_json(outcome.timings),
        }
        self.gateway.events.publish("request.finished", is_lasting=False, data=data)
        self.gateway.metrics.finished(self.model_name, outcome.n_prompt_tokens, outcome.timings)

    def ended(self, how: str, after_s: float, cause: str = "") -> None:
        """Tells of a choice that failed or that nobody waits for any more."""
        data = {**self._known, "n_tokens": self._n_tokens, "after_s": round(after_s, 3)}
        is_lasting = how == "failed"
        self.gateway.events.publish(f"request.{how}", cause=cause, is_lasting=is_lasting, data=data)
        if how == "cancelled":
            self.gateway.metrics.cancelled(self.model_name)


def timings_json(timings: Timings) -> dict[str, Any]:
    """Where the time of a generation went, as answers and events show it."""
    return {
        "first_token_ms": round(timings.first_token_s * 1e3, 3),
        "total_ms": round(timings.total_s * 1e3, 3),
        "tokens_per_s": timings.decode_tokens_per_s and round(timings.decode_tokens_per_s, 3),
        "first_hop_ms": round(timings.first_hop_ms, 3),
        "n_drafts": timings.n_drafts,
        "n_drafts_right": timings.n_drafts_right,
        "n_handed": timings.n_handed,
        "stages": [
            {
                "layer_start": stage.layer_start,
                "layer_end": stage.layer_end,
                "compute_ms": round(stage.compute_ms, 3),
                "queue_ms": round(stage.queue_ms, 3),
                "wire_ms": round(stage.wire_ms, 3),
            }
            for stage in timings.stages
        ],
    }


def usage_json(outcomes: Sequence[Outcome], n_choices_per_prompt: int) -> dict[str, Any]:
    """OpenAI's count: a prompt once however many choices it has."""
    prompts = outcomes[::n_choices_per_prompt]
    n_prompt = sum(outcome.n_prompt_tokens for outcome in prompts)
    n_reused = sum(outcome.timings.n_reused_tokens for outcome in prompts)
    n_tokens = sum(outcome.n_tokens for outcome in outcomes)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_tokens,
        "total_tokens": n_prompt + n_tokens,
        "prompt_tokens_details": {"cached_tokens": n_reused},
    }


def mesh_json(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What Shardmesh adds to an answer: which nodes served it and where the time went."""
    return [
        {
            "peer_ids": list(outcome.peer_ids),
            **timings_json(outcome.timings),
            "repairs": [dataclasses.asdict(repair) for repair in outcome.repairs],
        }
        for outcome in outcomes
    ]
