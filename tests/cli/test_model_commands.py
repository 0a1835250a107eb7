"""`ls` and `rm` on models that lie on this disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.torrents import make_model

from shardmesh.cli import ls, rm
from shardmesh.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards 0 and 1 of a model, and a file that was set aside."""
    make_model(tmp_path, 1000, 2000, name="flat", n_bytes_tokenizer=3000)
    (tmp_path / "shard-0.gguf.set-aside").write_bytes(b"x" * 4000)
    return tmp_path


def run(command: object, folder: Path, *words: str) -> Result:
    where = ("--shards-dir", str(folder), "--models-dir", str(folder / "models"))
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        command.command,  # type: ignore[attr-defined]
        [*words, *where],
    )


def test_what_was_set_aside_is_shown(folder: Path) -> None:
    (listed,) = json.loads(run(ls, folder, "--json").output)
    assert listed["set_aside"] == ["shard-0.gguf.set-aside"]
    assert (listed["n_bytes"], listed["n_bytes_set_aside"]) == (6000, 4000)
    assert " + " in run(ls, folder).output
    assert run(rm, folder, "flat", "--shard", "0", "-y").exit_code == 0
    (listed,) = json.loads(run(ls, folder, "--json").output)
    assert (listed["shards_here"], listed["set_aside"]) == ([1], [])
    assert "set aside" not in run(ls, folder).output


def test_in_a_pipe_each_model_has_one_line(tmp_path: Path) -> None:
    folder = tmp_path / ("a-folder-whose-name-is-long-" * 4)
    folder.mkdir()
    make_model(folder, 1000, 2000, name="Tales of a whole winter " * 3, n_bytes_tokenizer=3000)
    where = ("--shards-dir", str(folder), "--models-dir", str(folder / "models"))
    done = CliRunner().invoke(ls.command, where)
    heading, line = done.output.splitlines()
    assert line.rstrip().endswith(str(folder))
    assert "all 2" in line
    assert CliRunner().invoke(rm.command, ["a-folder", *where]).exit_code != 0
    (folder / "shard-0.gguf").unlink()
    assert "1 (of 0-1)" in CliRunner().invoke(ls.command, where).output, "which, not how many"
    assert heading.startswith("model")


def test_what_is_not_answered_with_yes_removes_nothing(folder: Path) -> None:
    where = ["--shards-dir", str(folder), "--models-dir", str(folder / "models")]
    said_no = CliRunner().invoke(rm.command, ["flat", *where], input="n\n", standalone_mode=False)
    assert (said_no.return_value, "Nothing was removed" in said_no.output) == (1, True)
    silent = CliRunner().invoke(rm.command, ["flat", *where], input="")
    assert isinstance(silent.exception, InputError)
    assert "-y" in silent.exception.next_step
    assert (folder / "shard-0.gguf").exists()


def test_a_shard_that_is_not_here_stops_all_of_it(folder: Path) -> None:
    done = run(rm, folder, "flat", "--shard", "1", "--shard", "7", "-y")
    assert isinstance(done.exception, InputError)
    assert "does not have shard 7" in str(done.exception)
    assert (folder / "shard-1.gguf").exists()
