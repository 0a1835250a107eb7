"""`shardmesh verify` from the command line: identical, different, impossible."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from support.models import BUILT_IN, write_model
from support.parts import write_in_parts

from shardmesh.cli.verify import command
from shardmesh.engine import verify
from shardmesh.engine.verify import compare_logits, describe_death, run_task
from shardmesh.engine.verify_worker import VerifyTask, step_lengths
from shardmesh.errors import EngineError, TheirError
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.layers import LayerRange
from shardmesh.shards.manifest import Manifest
from shardmesh.shards.split import split_model

FIELDS = {
    "identical",
    "max_abs_diff",
    "greedy_equal",
    "n_layers",
    "layer_ranges",
    "n_steps",
    "architecture",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    return write_model(folder / "model.gguf", "llama", vocabulary=BUILT_IN)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.mark.processes
def test_identical(model: Path) -> None:
    result = run(model, "--layers", "1,2,1", "--tokens", "2", "--prompt", "a tree", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report == {
        "identical": True,
        "max_abs_diff": 0.0,
        "greedy_equal": True,
        "n_layers": 4,
        "layer_ranges": [[0, 1], [1, 3], [3, 4]],
        "n_steps": 3,
        "architecture": "llama",
    }


@pytest.mark.processes
def test_a_model_in_parts_that_lie_elsewhere(model: Path, tmp_path: Path) -> None:
    """A cache of downloads has names that lead to files with other names; any part may be given."""
    links = []
    for part in write_in_parts(model, tmp_path):
        links.append(tmp_path / "snapshot" / part.name)
        links[-1].parent.mkdir(exist_ok=True)
        links[-1].symlink_to(part.rename(tmp_path / f"{len(links):064x}"))
    for link in links:
        result = run(link, "--layers", "2,2", "--tokens", "1", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["identical"]


@pytest.mark.processes
def test_pieces_of_a_length_that_is_wished_for(model: Path) -> None:
    prompt = "a tree and another tree " * 20
    reports = []
    for length in ("16", "64"):
        result = run(model, "--prompt", prompt, "--piece-tokens", length, "--tokens", "1", "--json")
        assert result.exit_code == 0, result.output
        reports.append(json.loads(result.stdout))
    assert all(report["identical"] for report in reports)
    assert reports[0]["n_steps"] > 2 * reports[1]["n_steps"] > 4


def split_wrongly(
    model: Path, ranges: Sequence[LayerRange], out_dir: Path, **options: Any
) -> Manifest:
    """Cuts, then changes the last bit of one weight of the second shard."""
    manifest = split_model(model, ranges, out_dir, **options)
    (tensor,) = [
        tensor
        for tensor in read_gguf(out_dir / "shard-1.gguf").tensors
        if tensor.name == "blk.0.ffn_down.weight"
    ]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset)
        byte = file.read(1)[0]
        file.seek(tensor.offset)
        file.write(bytes([byte ^ 1]))
    return manifest


@pytest.mark.processes
def test_one_bit_of_one_weight_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "split_model", split_wrongly)
    result = run(model, "--shards", "2", "--tokens", "1", "--json")
    assert result.exit_code == 1, result.output
    report = json.loads(result.stdout)
    assert set(report) == FIELDS
    assert report["identical"] is False
    assert 0 < report["max_abs_diff"] < 0.01
    assert report["greedy_equal"] is True


@pytest.mark.processes
def test_output_for_a_person(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(model, "--shards", "2", "--tokens", "1")
    assert result.exit_code == 0
    assert "identical" in result.stdout
    monkeypatch.setattr(verify, "split_model", split_wrongly)
    result = run(model, "--shards", "2", "--tokens", "1")
    assert result.exit_code == 1
    assert "different" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shards", "5"], "4 layers cannot be cut into 5"),
        (["--layers", "1,2"], "adds up to 3"),
        (["--shards", "2", "--layers", "2,2"], "exclude each other"),
        (["--tokens", "-1"], "--tokens must be"),
        (["--tokens", "999999"], "--tokens must be"),
    ],
)
def test_what_cannot_be_run_is_a_sentence(model: Path, arguments: list[str], sentence: str) -> None:
    result = run(model, *arguments, "--json")
    assert result.exit_code == 2
    assert set(answer := json.loads(result.stdout)) == {"error", "code", "next_step"}
    assert sentence in answer["error"]
    result = run(model, *arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_a_shard_is_no_model(model: Path, tmp_path: Path) -> None:
    split_model(model, [LayerRange(0, 2), LayerRange(2, 4)], tmp_path, name="test")
    result = run(tmp_path / "shard-0.gguf", "--json")
    assert result.exit_code == 2
    assert "shard already" in json.loads(result.stdout)["error"]


def worker_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Puts a stand-in for Python in the place of the worker."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\n{program}\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(verify.sys, "executable", str(stand_in))


@pytest.mark.processes
@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("kill -SEGV $$", "died inside llama.cpp (SIGSEGV)"),
        ("kill -ABRT $$", "died inside llama.cpp (SIGABRT)"),
        ("exit 1", "failed with exit code 1"),
    ],
)
def test_a_dead_process_is_a_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, sentence: str
) -> None:
    worker_that(tmp_path, monkeypatch, program)
    result = run(model, "--json")
    assert result.exit_code == 2
    assert sentence in json.loads(result.stdout)["error"]


@pytest.mark.processes
def test_a_process_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker_that(tmp_path, monkeypatch, "exec sleep 100")
    with pytest.raises(EngineError, match=r"not computed within 0\.2 s"):
        run_task(VerifyTask(model_path="m", outputs_path="o", piece_tokens=32), "the whole", 0.2)


@pytest.mark.processes
def test_errors_of_the_worker_keep_their_kind(tmp_path: Path) -> None:
    task = VerifyTask(model_path=str(tmp_path / "none.gguf"), outputs_path="o", piece_tokens=32)
    with pytest.raises(TheirError, match=r"whole model: .* cannot be read"):
        run_task(task, "the whole model", 60)


@pytest.mark.processes
def test_a_full_disk_names_a_way_out_that_there_is(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    result = run(model, "--shards", "2", "--tokens", "2")
    assert result.exit_code == 2
    assert "[NO_ROOM]" in result.stderr
    assert "TMPDIR" in result.stderr


def test_comparison_is_of_bits() -> None:
    def compare(a: list[float], b: list[float]) -> tuple[bool, float, bool]:
        return compare_logits(np.array([a], np.float32), np.array([b], np.float32))

    nan = float("nan")
    assert compare([1, 2], [1, 2]) == (True, 0.0, True)
    assert compare([nan, 2], [nan, 2]) == (True, 0.0, True)
    assert compare([0.0, 2], [-0.0, 2]) == (False, 0.0, True)
    assert compare([1, 2], [3, 2]) == (False, 2.0, False)
    identical, difference, _ = compare([nan, 2], [1, 2])
    assert not identical
    assert 1e300 < difference < float("inf")


def test_steps() -> None:
    assert step_lengths(16, 2, 32) == [16, 1, 1]
    assert step_lengths(1024, 0, 512) == [512, 512]
    assert step_lengths(513, 1, 512) == [512, 1, 1]
    assert step_lengths(70, 1, 32) == [32, 32, 6, 1]


def test_deaths_in_words() -> None:
    assert "SIGSEGV" in describe_death(-11)
    assert "signal 63" in describe_death(-63)
    assert "exit code 1" in describe_death(1)
