"""`/v1/chat/completions`: the next message of a conversation."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import trio
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from shardmesh.coordinator.coordinator import Completion
from shardmesh.coordinator.generate import Piece
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import ungrouped
from shardmesh.web.answers import CHAT_ANSWERS
from shardmesh.web.call_reader import CallPiece
from shardmesh.web.gateway import Gateway
from shardmesh.web.generation import Outcome, mesh_json, new_id, run_choice, usage_json
from shardmesh.web.logprobs import chat_entry
from shardmesh.web.requests import ChatBody
from shardmesh.web.routes import CallerOfRequest, GatewayOfApp
from shardmesh.web.sse import EventStream, SendEvent, while_wanted
from shardmesh.web.tools import Call, ToolPlan, ToolScanner
from shardmesh.web.translate import chat_requests

router = APIRouter(tags=["OpenAI"])

Say = Callable[[dict[str, Any], list[Any] | None], Awaitable[None]]
"""Takes a delta of the message and the log-probabilities of its tokens."""


@router.post("/v1/chat/completions", responses=CHAT_ANSWERS)
async def chat(
    body: ChatBody, request: Request, gateway: GatewayOfApp, caller: CallerOfRequest
) -> Response:
    """The model's next message; with `stream`, as server-sent events."""
    async with gateway.coordinator.open_model(body.model) as model:
        template = model.tokenizer.chat_template
    requests, tools = await trio.to_thread.run_sync(
        chat_requests, body, secrets.randbits(32), template, caller
    )
    answer = ChatAnswer(gateway, body, requests, tools)
    if body.stream:
        return EventStream(answer.stream)
    return JSONResponse(await while_wanted(request, answer.whole))


@dataclasses.dataclass
class _Told:
    """What was said of one choice, for an answer that comes as a whole."""

    texts: list[str] = dataclasses.field(default_factory=list)
    calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    logprobs: list[Any] = dataclasses.field(default_factory=list)

    def add(self, delta: dict[str, Any], logprobs: list[Any] | None) -> None:
        self.texts.append(delta.get("content") or "")
        self.calls += delta.get("tool_calls", [])
        self.logprobs += logprobs or []

    def message(self) -> dict[str, Any]:
        """The finished message; a call without text has no content."""
        text = "".join(self.texts)
        message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None}
        if self.calls:
            message["tool_calls"] = [
                {name: value for name, value in call.items() if name != "index"}
                for call in self.calls
            ]
        else:
            message["content"] = text
        return message


class ChatAnswer:
    """One answer: all its choices, at the same time."""

    def __init__(
        self,
        gateway: Gateway,
        body: ChatBody,
        requests: Sequence[CompletionRequest],
        tools: ToolPlan,
    ) -> None:
        self._gateway = gateway
        self._body = body
        self._requests = requests
        self._tools = tools
        self._outcomes: dict[int, Outcome] = {}
        self._model = body.model or ""
        self._id = new_id("chatcmpl")
        self._created_s = int(time.time())

    async def stream(self, send: SendEvent) -> None:
        """Sends each piece of each choice as it comes."""

        async def run(number: int) -> None:
            async def say(delta: dict[str, Any], logprobs: list[Any] | None) -> None:
                await send(self._chunk([_delta(number, delta, logprobs)]))

            reason = await self._run(number, say)
            await send(self._chunk([_delta(number, {}, None, reason)]))

        await self._run_all(run)
        if self._body.wants_usage:
            outcomes = self._in_order()
            usage = usage_json(outcomes, len(self._requests))
            await send({**self._chunk([]), "usage": usage, "shardmesh": mesh_json(outcomes)})
        await send("[DONE]")

    async def whole(self) -> dict[str, Any]:
        """The answer when all choices are finished."""
        told = [_Told() for _ in self._requests]
        reasons: dict[int, str] = {}

        async def run(number: int) -> None:
            async def say(delta: dict[str, Any], logprobs: list[Any] | None) -> None:
                told[number].add(delta, logprobs)

            reasons[number] = await self._run(number, say)

        await self._run_all(run)
        outcomes = self._in_order()
        return {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created_s,
            "model": self._model,
            "choices": [
                {
                    "index": number,
                    "message": each.message(),
                    "logprobs": self._logprobs(each.logprobs),
                    "finish_reason": reasons[number],
                }
                for number, each in enumerate(told)
            ],
            "usage": usage_json(outcomes, len(self._requests)),
            "shardmesh": mesh_json(outcomes),
        }

    async def _run_all(self, run: Callable[[int], Awaitable[None]]) -> None:
        with ungrouped():
            async with trio.open_nursery() as nursery:
                for number in range(len(self._requests)):
                    nursery.start_soon(run, number)

    async def _run(self, number: int, say: Say) -> str:
        """One choice to its end; why it ended."""
        scanner = ToolScanner(self._tools)

        async def start(completion: Completion) -> None:
            self._model = completion.chain.stages[0].model_name
            await say({"role": "assistant", "content": ""}, None)

        async def pass_on(piece: Piece, tokenizer: Tokenizer) -> None:
            text = scanner.feed(piece.text)
            logprobs = self._entries(piece, tokenizer)
            if text or logprobs:
                await say({"content": text}, logprobs)
            if self._body.stream:
                for new in scanner.take():
                    if self._is_wanted(new.number):
                        await say({"tool_calls": [_call_delta(new)]}, None)

        outcome = await run_choice(
            self._gateway,
            self._requests[number],
            answer_id=self._id,
            number=number,
            priority=self._body.priority,
            on_start=start,
            on_piece=pass_on,
        )
        self._outcomes[number] = outcome
        rest, calls = scanner.finish()
        if rest:
            await say({"content": rest}, None)
        if calls:
            numbered = enumerate(calls, scanner.n_streamed)
            told = [_call(number, call) for number, call in numbered if self._is_wanted(number)]
            if told:
                await say({"tool_calls": told}, None)
        return "tool_calls" if calls or scanner.has_streamed else outcome.reason

    def _is_wanted(self, number: int) -> bool:
        """Whether the client takes more than one call."""
        return number == 0 or self._body.parallel_tool_calls is not False

    def _entries(self, piece: Piece, tokenizer: Tokenizer) -> list[Any] | None:
        if not self._body.logprobs or piece.token is None:
            return None
        return [chat_entry(piece.token, self._body.top_logprobs or 0, tokenizer)]

    def _logprobs(self, entries: list[Any]) -> dict[str, Any] | None:
        return {"content": entries, "refusal": None} if self._body.logprobs else None

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
        }

    def _in_order(self) -> list[Outcome]:
        return [self._outcomes[number] for number in sorted(self._outcomes)]


def _delta(
    number: int, delta: dict[str, Any], logprobs: list[Any] | None, reason: str | None = None
) -> dict[str, Any]:
    shown = None if logprobs is None else {"content": logprobs, "refusal": None}
    return {"index": number, "delta": delta, "logprobs": shown, "finish_reason": reason}


def _call_delta(new: CallPiece) -> dict[str, Any]:
    """A part of a call: with its name at the beginning, then arguments only."""
    if new.name is not None:
        return _call(new.number, Call(new.name, new.arguments))
    return {"index": new.number, "function": {"arguments": new.arguments}}


def _call(number: int, call: Call) -> dict[str, Any]:
    return {
        "index": number,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
