"""`/v1/completions`: text that goes on from a prompt."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from shardmesh.coordinator.coordinator import Completion
from shardmesh.coordinator.generate import Piece
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import ungrouped
from shardmesh.web.answers import COMPLETION_ANSWERS
from shardmesh.web.gateway import Gateway
from shardmesh.web.generation import Outcome, mesh_json, new_id, run_choice, usage_json
from shardmesh.web.logprobs import CompletionLogprobs
from shardmesh.web.requests import CompletionBody
from shardmesh.web.routes import CallerOfRequest, GatewayOfApp
from shardmesh.web.sse import EventStream, SendEvent, while_wanted
from shardmesh.web.translate import completion_requests

router = APIRouter(tags=["OpenAI"])

Say = Callable[[str, dict[str, Any] | None], Awaitable[None]]
"""Takes a piece of text and its log-probabilities."""


@router.post("/v1/completions", responses=COMPLETION_ANSWERS)
async def complete(
    body: CompletionBody, request: Request, gateway: GatewayOfApp, caller: CallerOfRequest
) -> Response:
    """Text that goes on from a prompt; with `stream`, as server-sent events."""
    answer = CompletionAnswer(gateway, body, caller)
    if body.stream:
        return EventStream(answer.stream)
    found = await while_wanted(request, answer.whole)
    return JSONResponse(found)


class CompletionAnswer:
    """One answer: all its choices, at the same time."""

    def __init__(self, gateway: Gateway, body: CompletionBody, caller: str) -> None:
        """Raises InputError (theirs) for a request that contradicts itself."""
        self._gateway = gateway
        self._body = body
        self._requests = completion_requests(body, secrets.randbits(32), caller)
        self._outcomes: dict[int, Outcome] = {}
        self._model = body.model or ""
        self._id = new_id("cmpl")
        self._created_s = int(time.time())

    async def stream(self, send: SendEvent) -> None:
        """Sends each piece of each choice as it comes."""

        async def run(number: int) -> None:
            async def say(text: str, logprobs: dict[str, Any] | None) -> None:
                if text or logprobs:
                    await send(self._chunk([_choice(number, text, logprobs)]))

            outcome = await self._run(number, say)
            await send(self._chunk([_choice(number, "", None, outcome.reason)]))

        await self._run_all(run)
        if self._body.wants_usage:
            more = {"usage": self._usage(), "shardmesh": mesh_json(self._in_order())}
            await send({**self._chunk([]), **more})
        await send("[DONE]")

    async def whole(self) -> dict[str, Any]:
        """The answer when all choices are finished."""
        texts: list[list[str]] = [[] for _ in self._requests]
        logprobs: list[dict[str, list[Any]]] = [{} for _ in self._requests]

        async def run(number: int) -> None:
            async def say(text: str, more: dict[str, Any] | None) -> None:
                texts[number].append(text)
                for name, values in (more or {}).items():
                    logprobs[number].setdefault(name, []).extend(values)

            await self._run(number, say)

        await self._run_all(run)
        return {
            **self._chunk(
                [
                    _choice(
                        number,
                        "".join(texts[number]),
                        logprobs[number] or None,
                        self._outcomes[number].reason,
                    )
                    for number in range(len(self._requests))
                ]
            ),
            "usage": self._usage(),
            "shardmesh": mesh_json(self._in_order()),
        }

    async def _run_all(self, run: Callable[[int], Awaitable[None]]) -> None:
        with ungrouped():
            async with trio.open_nursery() as nursery:
                for number in range(len(self._requests)):
                    nursery.start_soon(run, number)

    async def _run(self, number: int, say: Say) -> Outcome:
        request, body = self._requests[number], self._body
        notes = CompletionLogprobs(body.logprobs) if body.logprobs is not None else None
        echoed: list[Completion] = []  # whose prompt waits for its log-probabilities

        async def start(completion: Completion) -> None:
            self._model = completion.chain.stages[0].model_name
            if request.score_prompt:
                echoed.append(completion)
            elif body.echo:
                await say(_echo(request, completion.tokenizer), None)

        async def pass_on(piece: Piece, tokenizer: Tokenizer) -> None:
            text = "" if body.max_tokens == 0 else piece.text
            if notes is not None and echoed:
                asked = echoed.pop()
                text = (prompt := _echo(request, tokenizer)) + text
                notes.add_prompt(prompt, asked.prompt, asked.prompt_scores, tokenizer)
            if notes is not None and piece.token is not None and body.max_tokens != 0:
                notes.add(piece.token, tokenizer)
            await say(text, notes.take() if notes is not None else None)

        outcome = await run_choice(
            self._gateway,
            request,
            answer_id=self._id,
            number=number,
            priority=body.priority,
            on_start=start,
            on_piece=pass_on,
        )
        if body.max_tokens == 0:
            outcome = dataclasses.replace(outcome, reason="length", n_tokens=0)
        self._outcomes[number] = outcome
        return outcome

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
        }

    def _in_order(self) -> list[Outcome]:
        return [self._outcomes[number] for number in sorted(self._outcomes)]

    def _usage(self) -> dict[str, int]:
        return usage_json(self._in_order(), self._body.n or 1)


def _choice(
    number: int, text: str, logprobs: dict[str, Any] | None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _echo(request: CompletionRequest, tokenizer: Tokenizer) -> str:
    if request.prompt is not None:
        return request.prompt
    return tokenizer.decode(request.prompt_tokens).decode("utf-8", "replace")
