"""Tokens that the last stage sends straight to the first, with real processes: the same text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.asking import ask
from support.processes import Mesh
from support.reference import N_TOKENS, PROMPT, Reference

pytestmark = pytest.mark.processes

GREEDY = ("--temperature", "0", "--max-tokens", str(N_TOKENS))


def handed(mesh: Mesh) -> list[int]:
    """How many each stage has got so far."""
    return [answer["stage"]["n_tokens_handed"] for answer in ask(mesh, "GET_METRICS")]


@pytest.mark.parametrize("drafts", ["off", "auto"])
def test_tokens_go_straight_to_the_first_stage(
    mesh: Mesh, references: dict[str, Reference], drafts: str
) -> None:
    before = handed(mesh)
    options = ("--json", "--drafts", drafts, *GREEDY, *mesh.where)
    done = mesh.space.run("run", PROMPT, *options)
    assert done.code == 0, done.err
    answer: dict[str, Any] = json.loads(done.out)
    assert answer["text"] == references[PROMPT].text
    first, *others = (now - then for now, then in zip(handed(mesh), before, strict=True))
    assert others == [0, 0, 0]
    if drafts == "off":
        # The link may have come up behind the first few, and some may have come too late.
        n_handed = answer["timings"]["n_handed"]
        assert N_TOKENS // 2 < n_handed < N_TOKENS
        assert N_TOKENS // 3 < first <= n_handed + 1


def test_timings_tell_a_person_and_add_up(mesh: Mesh) -> None:
    options = ("--drafts", "off", "--ignore-end", *GREEDY, *mesh.where)
    done = mesh.space.run("run", PROMPT, "--timings", *options)
    assert "tokens went straight from the last stage to the first" in done.err
    done = mesh.space.run("run", PROMPT, "--json", *options)
    timings = json.loads(done.out)["timings"]
    parts_ms = timings["first_hop_ms"] + sum(
        stage[part] for stage in timings["stages"] for part in ("compute_ms", "queue_ms", "wire_ms")
    )
    whole_ms = 1e3 * (timings["total_s"] - timings["first_token_s"])
    assert parts_ms == pytest.approx(whole_ms, rel=0.1)
