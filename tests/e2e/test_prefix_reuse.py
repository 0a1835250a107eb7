"""Prompts that begin alike, with real processes: the same text, computed once, never of others."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from support.processes import Mesh

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

COMMON = "The old king went into the deep forest, and the wind was very cold there. " * 10
PROMPT = COMMON + "Then he said:"
OTHER = COMMON + "But nobody had seen the wolf"
SAMPLED = ("--temperature", "0.9", "--seed", "5", "--repeat-penalty", "1.2")
START_TIMEOUT_S = 60.0
TIMEOUT_S = 60.0
ALICE, BOB = "alice-has-a-long-token", "bob-has-a-long-token-too"


def run(mesh: Mesh, prompt: str, *options: str) -> dict[str, Any]:
    arguments = ("--max-tokens", "12", *SAMPLED, *options, *mesh.where)
    done = mesh.space.run("run", prompt, "--json", *arguments)
    assert done.code == 0, done.err
    answer: dict[str, Any] = json.loads(done.out)
    return answer


def n_reused(answer: dict[str, Any]) -> int:
    found: int = answer["timings"]["n_reused_tokens"]
    return found


def test_two_commands_of_one_user_share_and_write_the_same(mesh: Mesh) -> None:
    alone = [run(mesh, prompt, "--no-prefix-reuse") for prompt in (PROMPT, OTHER)]
    assert [n_reused(answer) for answer in alone] == [0, 0]
    first = run(mesh, PROMPT)
    other = run(mesh, OTHER)
    again = run(mesh, PROMPT)
    assert n_reused(first) == 0, "what --no-prefix-reuse computed was left there"
    assert n_reused(other) > 100
    assert n_reused(again) > 100
    assert [first["text"], other["text"], again["text"]] == [
        alone[0]["text"],
        alone[1]["text"],
        alone[0]["text"],
    ]


def test_timings_tell_a_person(mesh: Mesh) -> None:
    prompt = COMMON + "And so"
    mesh.space.run("run", prompt, "--max-tokens", "1", *mesh.where)
    done = mesh.space.run("run", prompt, "--max-tokens", "1", "--timings", *mesh.where)
    assert "of them reused" in done.err


def test_two_tokens_of_a_gateway_never_share(mesh: Mesh) -> None:
    tokens = mesh.space.folder / "tokens"
    tokens.write_text(f"alice:{ALICE}\nbob:{BOB}\n")
    tokens.chmod(0o600)
    gateway = mesh.space.start(
        *("web", "--port", "0", "--ws-port", "0", "--api-token-file", str(tokens), *mesh.where)
    )
    try:
        url = gateway.wait_line(r"\[WEB\] HTTP on (http://\S+)", START_TIMEOUT_S)[1]
        prompt = COMMON + "In the evening"
        asked = [
            ask(url, token, prompt, stream) for token in (ALICE, BOB) for stream in (False, True)
        ]
        assert [n > 100 for _, n in asked] == [False, True, False, True]
        assert len({text for text, _ in asked}) == 1
        metrics = httpx.get(f"{url}metrics", headers=_bearer(ALICE), timeout=TIMEOUT_S).text
        counted = [
            line for line in metrics.splitlines() if line.startswith("shardmesh_reused_prompt_")
        ]
        assert float(counted[0].split()[-1]) == sum(n for _, n in asked)
    finally:
        gateway.close()


def ask(url: str, token: str, prompt: str, stream: bool) -> tuple[str, int]:
    """The text, and how many tokens of the prompt were reused."""
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    answer = httpx.post(
        f"{url}v1/completions", json=body, headers=_bearer(token), timeout=TIMEOUT_S
    )
    assert answer.status_code == 200, answer.text
    if not stream:
        found = answer.json()
        return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    pieces = [json.loads(line) for line in lines]
    text = "".join(choice["text"] for piece in pieces for choice in piece["choices"])
    return text, pieces[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]


def _bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
