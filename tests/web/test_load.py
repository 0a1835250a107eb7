"""Many streaming requests at once through the gateway: all complete, all correct."""

from __future__ import annotations

import json

import httpx
import pytest
import trio

from shardmesh.demo_model import DEMO_MODEL

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not DEMO_MODEL.exists(), reason="the demo model is not here"),
]

N_REQUESTS = 200
N_AT_ONCE = 32
N_TOKENS = 8
PROMPTS = ("Once upon a time", "The king said", "In a dark wood", "The youngest daughter")
TIMEOUT_S = 150.0


async def stream(client: httpx.AsyncClient, prompt: str) -> tuple[str, int]:
    """The text of one answer, and the tokens that its end reports."""
    body = {
        "prompt": prompt,
        "max_tokens": N_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, n_tokens, is_done = "", 0, False
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                is_done = True
            elif data:
                piece = json.loads(data)
                text += "".join(choice["text"] for choice in piece["choices"])
                n_tokens = piece.get("usage", {}).get("completion_tokens", n_tokens)
    assert is_done
    return text, n_tokens


async def test_two_hundred_requests_thirty_two_at_once(url: str) -> None:
    limits = httpx.Limits(max_connections=N_AT_ONCE)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        expected = {prompt: await stream(client, prompt) for prompt in PROMPTS}
        answers: dict[int, tuple[str, int]] = {}
        at_once = trio.CapacityLimiter(N_AT_ONCE)

        async def ask(number: int) -> None:
            async with at_once:
                answers[number] = await stream(client, PROMPTS[number % len(PROMPTS)])

        async with trio.open_nursery() as nursery:
            for number in range(N_REQUESTS):
                nursery.start_soon(ask, number)
    wrong = [n for n in range(N_REQUESTS) if answers[n] != expected[PROMPTS[n % len(PROMPTS)]]]
    assert wrong == []
    assert all(n_tokens == N_TOKENS for _, n_tokens in expected.values())
