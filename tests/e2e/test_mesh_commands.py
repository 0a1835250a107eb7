"""The JSON commands, sent by hand with `shardmesh command`, as a user does."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from support.asking import ask
from support.processes import Finished, Mesh
from support.reference import N_TOKENS, PROMPT, Reference

pytestmark = pytest.mark.processes

INFERENCE = json.dumps({"prompt": PROMPT, "temperature": 0, "max_tokens": N_TOKENS})
"""What any node is asked to write."""

BAD = {
    "unknown command": ("SING", "{}", "UNKNOWN_COMMAND"),
    "no JSON": ("GET_METRICS", "nix", "BAD_JSON"),
    "unknown parameter": ("GET_METRICS", '{"nix": 1}', "BAD_MESSAGE"),
    "no such shard": ("LOAD_SHARD", '{"shard_id": 9}', "NO_SUCH_SHARD"),
    "another model": ("LOAD_SHARD", '{"shard_id": 0, "model": "nix"}', "UNKNOWN_MODEL"),
    "empty prompt and messages": ("INFERENCE", "{}", "BAD_MESSAGE"),
}


def answer_of(done: Finished) -> dict[str, Any]:
    assert done.code == 0, done.err
    answer: dict[str, Any] = json.loads(done.out)
    return answer


@pytest.fixture(scope="module")
def answers(mesh: Mesh) -> dict[str, Finished]:
    """Each command to another node, named by the end of its peer id or by its address."""
    nodes = [node.peer_id[-8:] for node in mesh.listeners]
    commands = {
        "GET_CAPABILITIES": (mesh.listeners[1].address, "GET_CAPABILITIES"),
        "LIST_FILES": (nodes[2], "LIST_FILES"),
        "INFERENCE": (nodes[3], "INFERENCE", INFERENCE),
        "bootstrap": (mesh.bootstrap.address, "GET_CAPABILITIES"),
        "unknown node": ("nix", "GET_METRICS"),
        "unloaded bootstrap": (mesh.bootstrap.address, "INFERENCE", INFERENCE),
    }
    done = mesh.space.run_all(*(("command", *words, *mesh.where) for words in commands.values()))
    return dict(zip(commands, done, strict=True))


def test_capabilities(mesh: Mesh, answers: dict[str, Finished]) -> None:
    answer, node = answer_of(answers["GET_CAPABILITIES"]), mesh.listeners[1]
    shard = json.loads((mesh.shards_dir / "manifest.json").read_text())["shards"][1]
    assert (answer["peer_id"], answer["addresses"]) == (node.peer_id, [node.address])
    assert (answer["shard_id"], answer["total_shards"], answer["total_layers"]) == (1, 4, 8)
    assert [answer[k] for k in ("layer_start", "layer_end")] == [
        shard[k] for k in ("layer_start", "layer_end")
    ]
    assert answer["shard_state"] == "loaded"
    assert answer["capabilities"]["shard_loaded"] is True
    assert answer["capabilities"]["memory_mb"] > 0
    assert answer["capabilities"]["cpu_cores"] > 0


def test_files_come_with_size_and_digest(mesh: Mesh, answers: dict[str, Finished]) -> None:
    files = {file["name"]: file for file in answer_of(answers["LIST_FILES"])["files"]}
    assert {f"shard-{i}.gguf" for i in range(4)} <= set(files)
    for name, file in files.items():
        data = (mesh.shards_dir / name).read_bytes()
        assert (file["n_bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())


def test_any_node_answers_a_prompt(
    answers: dict[str, Finished], references: dict[str, Reference]
) -> None:
    answer = answer_of(answers["INFERENCE"])
    assert answer["text"] == references[PROMPT].text
    assert len(answer["chain"]) == 4


def test_a_bootstrap_says_what_it_is(mesh: Mesh, answers: dict[str, Finished]) -> None:
    answer = answer_of(answers["bootstrap"])
    assert (answer["role"], answer["peer_id"]) == ("bootstrap", mesh.bootstrap.peer_id)


@pytest.mark.parametrize(
    ("name", "code", "error_code"),
    [("unknown node", 2, "UNKNOWN_PEER"), ("unloaded bootstrap", 2, "UNSUPPORTED_COMMAND")],
)
def test_wrong_nodes_are_one_sentence(
    answers: dict[str, Finished], name: str, code: int, error_code: str
) -> None:
    done = answers[name]
    assert (done.code, done.out) == (code, "")
    assert done.is_one_sentence, done.err
    assert f"[{error_code}]" in done.err


@pytest.fixture(scope="module")
def refusals(mesh: Mesh) -> dict[str, Finished]:
    peer = mesh.listeners[0].address
    commands = [("command", peer, name, params, *mesh.where) for name, params, _ in BAD.values()]
    return dict(zip(BAD, mesh.space.run_all(*commands), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_one_sentence(refusals: dict[str, Finished], name: str) -> None:
    done = refusals[name]
    assert (done.code, done.out) == (2, "")
    assert done.is_one_sentence, done.err
    assert f"[{BAD[name][2]}]" in done.err


def test_metrics_count(mesh: Mesh) -> None:
    before = ask(mesh, "GET_METRICS")
    ask(mesh, "INFERENCE", {"prompt": PROMPT, "temperature": 0, "max_tokens": 3})
    after = ask(mesh, "GET_METRICS")
    for old, new in zip(before, after, strict=True):
        # Four prompts, one through each coordinator, all of them through every stage.
        assert new["stage"]["n_sessions_opened"] == old["stage"]["n_sessions_opened"] + 4
        assert new["stage"]["n_tokens"] > old["stage"]["n_tokens"]
        counted = new["commands"]["INFERENCE"]
        assert counted["n_requests"] == old["commands"]["INFERENCE"]["n_requests"] + 1
        assert 0 < counted["success_rate"] <= 1
        assert counted["latency_ms"] > 0
        assert new["n_data_process_restarts"] == 0
        assert new["data_memory_bytes"] > 0
