"""Guessing ahead, with real processes: the same text, and guesses that come true."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.asking import as_client
from support.models import write_model
from support.processes import Mesh

from shardmesh.coordinator.client import Client
from shardmesh.coordinator.generate import Finished
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.base import SamplingSettings

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

PROMPT = "Once upon a time there was a king who"
"""Behind this the demo model soon turns in circles, when it is greedy."""

SAMPLED = ("--temperature", "0.5", "--seed", "11", "--repeat-penalty", "0.9")


def run(mesh: Mesh, *options: str) -> dict[str, Any]:
    arguments = ("--max-tokens", "64", "--ignore-end", *options, *mesh.where)
    done = mesh.space.run("run", PROMPT, "--json", *arguments)
    assert done.code == 0, done.err
    answer: dict[str, Any] = json.loads(done.out)
    return answer


@pytest.mark.parametrize("sampling", [("--temperature", "0"), SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_the_same_whatever_is_guessed(mesh: Mesh, sampling: tuple[str, ...]) -> None:
    alone = run(mesh, *sampling, "--drafts", "off")
    guessed = run(mesh, *sampling, "--drafts", "8")
    assert guessed["text"] == alone["text"]
    assert alone["timings"]["n_drafts"] == 0
    assert guessed["timings"]["n_drafts"] >= guessed["timings"]["n_drafts_right"] > 0


SAMPLINGS = {
    "grammar": SamplingSettings(
        temperature=0.8, seed=3, grammar='root ::= ("the king and " | "the fox and ")+'
    ),
    "penalties": SamplingSettings(
        temperature=0.8, seed=3, frequency_penalty=-0.4, presence_penalty=0.2, repeat_penalty=0.9
    ),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_what_the_sampler_remembers_is_the_same(mesh: Mesh, name: str) -> None:
    async def write(client: Client, n_drafts: int) -> tuple[list[int], int]:
        request = CompletionRequest(
            prompt=PROMPT, n_tokens_max=48, sampling=SAMPLINGS[name], n_drafts=n_drafts
        )
        tokens: list[int] = []
        n_right = 0
        async with client.coordinator.complete(request) as completion:
            async for item in completion.items:
                if isinstance(item, Finished):
                    n_right = item.timings.n_drafts_right
                elif item.token is not None:
                    tokens.append(item.token.token)
        return tokens, n_right

    async def use(client: Client) -> None:
        alone, _ = await write(client, 0)
        guessed, n_right = await write(client, 8)
        assert guessed == alone
        assert n_right > 0

    as_client(mesh, use)


def test_a_draft_model_guesses_what_it_would_write_itself(mesh: Mesh, model: Path) -> None:
    """The model of the mesh as its own draft model: whatever is guessed in time is right."""
    greedy = ("--temperature", "0", "--repeat-penalty", "1.3")  # it does not repeat itself
    alone = run(mesh, *greedy, "--drafts", "off")
    guessed = run(mesh, *greedy, "--drafts", "4", "--draft-model", str(model))
    assert guessed["text"] == alone["text"]
    assert guessed["timings"]["n_drafts"] >= guessed["timings"]["n_drafts_right"] > 0


def test_a_draft_model_with_another_vocabulary_is_refused(mesh: Mesh, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", n_layer=1)
    done = mesh.space.run("run", "a", "--draft-model", str(other), *mesh.where)
    assert done.code == 2
    assert "another vocabulary" in done.err


def test_timings_tell_a_person(mesh: Mesh) -> None:
    options = ("--temperature", "0", "--timings", "--max-tokens", "24", *mesh.where)
    done = mesh.space.run("run", PROMPT, "--drafts", "4", *options)
    assert "tokens guessed ahead" in done.err
    done = mesh.space.run("run", PROMPT, "--drafts", "off", *options)
    assert "no token was guessed ahead" in done.err


def test_what_is_no_number_is_refused(mesh: Mesh) -> None:
    done = mesh.space.run("run", "a", "--drafts", "99", *mesh.where)
    assert done.code == 2
    assert "--drafts is auto, off or 1 to 32" in done.err
