"""A mesh of five real processes as a user has it: seen, asked, and exact."""

from __future__ import annotations

import json
import re
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from support.asking import ask, wait_no_sessions
from support.processes import Finished, Mesh
from support.reference import N_CTX, N_TOKENS, PROMPT, PROMPTS, Reference

pytestmark = pytest.mark.processes

GREEDY = ("--temperature", "0", "--max-tokens", str(N_TOKENS))
IDLE_S = 62.0  # beyond the 60 seconds after which connections that nobody wants are closed


def run_json(done: Finished) -> dict[str, Any]:
    assert done.code == 0, done.err
    answer: dict[str, Any] = json.loads(done.out)
    return answer


# -- who is there ------------------------------------------------------------------------------


def test_status_finds_all_four(mesh: Mesh) -> None:
    done = mesh.space.run("status", "--json", *mesh.where)
    (model,) = run_json(done)
    manifest = json.loads((mesh.shards_dir / "manifest.json").read_text())
    assert (model["complete"], model["missing"], model["n_layer"]) == (True, [], 8)
    assert [
        (r["shard_id"], r["peer_id"], r["layer_start"], r["layer_end"], r["state"], r["addresses"])
        for r in model["replicas"]
    ] == [
        (
            shard["shard_id"],
            node.peer_id,
            shard["layer_start"],
            shard["layer_end"],
            "loaded",
            [node.address],
        )
        for shard, node in zip(manifest["shards"], mesh.listeners, strict=True)
    ]


def test_status_says_complete_to_a_person(mesh: Mesh) -> None:
    done = mesh.space.run("status", *mesh.where)
    assert done.code == 0
    assert "pipeline complete" in done.out
    assert done.out.count("loaded") == 4


def test_nodes_are_connected_with_each_other(mesh: Mesh) -> None:
    for one, other in permutations(mesh.listeners, 2):
        one.running.wait_line(rf"Connection established! {other.peer_id}")


# -- text --------------------------------------------------------------------------------------


def test_run_writes_what_llama_writes(mesh: Mesh, references: dict[str, Reference]) -> None:
    done = mesh.space.run("run", PROMPT, *GREEDY, *mesh.where)
    assert (done.code, done.out, done.err) == (0, references[PROMPT].text + "\n", "")


def test_every_node_writes_the_tokens_of_llama(
    mesh: Mesh, references: dict[str, Reference]
) -> None:
    params = {"prompt": PROMPT, "temperature": 0, "max_tokens": N_TOKENS, "n_top_logprobs": 1}
    for answer in ask(mesh, "INFERENCE", params):
        assert [token["token"] for token in answer["tokens"]] == references[PROMPT].tokens
        assert answer["text"] == references[PROMPT].text
        assert answer["chain"] == [node.peer_id for node in mesh.listeners]


def test_several_at_once_do_not_mix(mesh: Mesh, references: dict[str, Reference]) -> None:
    done = mesh.space.run_all(*(("run", p, "--json", *GREEDY, *mesh.where) for p in PROMPTS))
    assert [run_json(each)["text"] for each in done] == [references[p].text for p in PROMPTS]


def test_a_seed_gives_the_same_text_again(mesh: Mesh) -> None:
    seeds = ("7", "7", "8")
    common = ("--temperature", "1.2", "--max-tokens", "20", "--json", *mesh.where)
    first, again, other = (
        run_json(done)
        for done in mesh.space.run_all(*(("run", PROMPT, "--seed", s, *common) for s in seeds))
    )
    assert (first["text"], first["seed"]) == (again["text"], 7)
    assert first["text"] != other["text"]


def test_prompt_from_standard_input_until_a_stop_string(
    mesh: Mesh, references: dict[str, Reference]
) -> None:
    text = references[PROMPT].text
    stop = text[len(text) // 2 :][:5]
    done = mesh.space.run("run", "-", "--stop", stop, *GREEDY, *mesh.where, input_text=PROMPT)
    assert (done.code, done.out) == (0, text[: text.index(stop)] + "\n")


def test_json_tells_all(mesh: Mesh, references: dict[str, Reference]) -> None:
    answer = run_json(mesh.space.run("run", PROMPT, "--json", *GREEDY, *mesh.where))
    manifest = json.loads((mesh.shards_dir / "manifest.json").read_text())
    assert answer["text"] == references[PROMPT].text
    assert answer["model"] == manifest["model_name"]
    assert answer["finish_reason"] in ("stop", "length")
    assert answer["chain"] == [node.peer_id for node in mesh.listeners]
    assert answer["timings"]["n_tokens"] >= len(references[PROMPT].tokens)


def test_timings_do_not_mix_with_the_text(mesh: Mesh, references: dict[str, Reference]) -> None:
    done = mesh.space.run("run", PROMPT, "--timings", *GREEDY, *mesh.where)
    assert (done.code, done.out) == (0, references[PROMPT].text + "\n")
    assert re.search(r"first token after \d+ ms", done.err)
    for layers in ("[0, ", ", 8)"):
        assert layers in done.err


def test_a_client_without_the_tokenizer_fetches_it(
    mesh: Mesh, references: dict[str, Reference], tmp_path: Path
) -> None:
    own = ("--shards-dir", str(tmp_path / "shards"), *mesh.member)
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = mesh.space.run("run", PROMPT, *GREEDY, *own, variables=home)
    assert (done.code, done.out) == (0, references[PROMPT].text + "\n"), done.err
    (fetched,) = (tmp_path / "cache").rglob("tokenizer.gguf")
    assert fetched.read_bytes() == (mesh.shards_dir / "tokenizer.gguf").read_bytes()
    assert not (tmp_path / "shards").exists()


# -- what cannot be answered -------------------------------------------------------------------


FAILURES = {
    "prompt too long": (["run", "king " * N_CTX], 2, "PROMPT_TOO_LONG", str(N_CTX)),
    "unknown model": (["run", PROMPT, "--model", "nix"], 2, "UNKNOWN_MODEL", "nix"),
    "other cluster": (["run", PROMPT, "--cluster", "nix"], 1, "OTHER_CLUSTER", "nix"),
    "no bootstrap": (  # of a cluster of which no node is remembered
        ["run", PROMPT, "--cluster", "nix", "--bootstrap", "/ip4/127.0.0.1/tcp/9"],
        1,
        "NO_BOOTSTRAP",
        "",
    ),
    "not an address": (["run", PROMPT, "--bootstrap", "nix"], 2, "BAD_INPUT", "nix"),
    "empty stop": (["run", PROMPT, "--stop", ""], 2, "BAD_INPUT", "stop string"),
}


@pytest.fixture(scope="module")
def failures(mesh: Mesh) -> dict[str, Finished]:
    """All of them at the same time, since some wait for what does not come."""
    commands = [[*arguments, *_left_open(arguments, mesh)] for arguments, *_ in FAILURES.values()]
    return dict(zip(FAILURES, mesh.space.run_all(*commands), strict=True))


def _left_open(arguments: list[str], mesh: Mesh) -> list[str]:
    """Options of the mesh that the arguments do not give themselves."""
    pairs = zip(mesh.where[::2], mesh.where[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in arguments for word in pair]


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_sentence(failures: dict[str, Finished], name: str) -> None:
    _, code, error_code, words = FAILURES[name]
    done = failures[name]
    assert (done.code, done.out) == (code, "")
    assert done.is_one_sentence, done.err
    assert f"[{error_code}]" in done.err
    assert words in done.err


def test_a_prompt_may_be_empty_only_if_the_model_begins_by_itself(mesh: Mesh) -> None:
    done = mesh.space.run("run", "-", *GREEDY, *mesh.where)
    if done.code:
        assert (done.code, done.is_one_sentence) == (2, True)
    assert "Error" in done.err or done.out


# -- ends --------------------------------------------------------------------------------------


def test_ctrl_c_frees_all_stages(mesh: Mesh) -> None:
    running = mesh.space.start(
        "run", PROMPT, "--ignore-end", "--max-tokens", str(N_CTX), "--seed", "1", *mesh.where
    )
    running.wait_line(r"\w")
    running.interrupt()
    assert running.wait_end(3) == 130
    assert not any("Error" in line for line in running.lines)
    wait_no_sessions(mesh)


@pytest.mark.slow
def test_idle_connections_between_nodes_stay(mesh: Any) -> None:
    """Nothing between nodes was closed since the mesh is up, which is more than 60 s."""
    names = "|".join([mesh.bootstrap.peer_id, *(node.peer_id for node in mesh.listeners)])
    closed = rf"Connection closed: ({names})"
    first = mesh.listeners[0].running
    first.line_within(closed, max(0.0, mesh.ready_s + IDLE_S - time.monotonic()))
    for node in (mesh.bootstrap, *mesh.listeners):
        assert not [line for line in node.running.lines if re.search(closed, line)]


@pytest.mark.slow
def test_no_log_holds_what_was_asked_or_written(
    mesh: Mesh, references: dict[str, Reference]
) -> None:
    for node in (mesh.bootstrap, *mesh.listeners):
        log = "\n".join(node.running.lines)
        for prompt in PROMPTS[:-1]:  # the last one is a word that any log may hold
            assert prompt not in log
            assert references[prompt].text[:20] not in log
