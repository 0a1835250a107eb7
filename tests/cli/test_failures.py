"""What a person is told when a command fails."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import click
import pytest

from shardmesh.cli.failures import of_command_line, of_machine, require_folder, require_text
from shardmesh.cli.numbers import FiniteRange
from shardmesh.errors import InputError

_TIMEOUT_S = 30


def shardmesh(
    *words: str, stdout: int | IO[bytes] = subprocess.PIPE, **variables: str
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the real command."""
    done = subprocess.run(
        [sys.executable, "-m", "shardmesh", *words],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **variables},
        timeout=_TIMEOUT_S,
        check=False,
    )
    return done.returncode, (done.stdout or b"").decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("words", "sentence", "step"),
    [
        (("nonsense",), "No such command 'nonsense'", "`shardmesh --help`"),
        (("ls", "--nonsense"), "No such option '--nonsense'", "`shardmesh ls --help`"),
        (("cluster", "nope"), "No such command 'nope'", "`shardmesh cluster --help`"),
        (("split", "a.gguf", "--shards", "x"), "'x' is not a valid integer", "split --help`"),
        (("verify", "a.gguf", "--timeout", "nan"), "nan is no number", "verify --help`"),
        (("split", "a.gguf", "--name", "a\udcffb"), r"'a\udcffb'", "write it in UTF-8"),
    ],
)
def test_every_wrong_line_has_a_code_and_a_next_step(
    words: tuple[str, ...], sentence: str, step: str
) -> None:
    code, output, error = shardmesh(*words)
    assert (code, output) == (2, "")
    assert error.startswith("Error [BAD_INPUT]: ")
    first, second = error.splitlines()
    assert sentence in first
    assert second.startswith("  next step: ")
    assert step in second


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_told_of(tmp_path: Path) -> None:
    words = ("ls", "--json", "--shards-dir", str(tmp_path), "--models-dir", str(tmp_path))
    with Path("/dev/full").open("wb") as full:
        code, _, error = shardmesh(*words, stdout=full)
    assert code == 1
    assert error.splitlines()[0] == "Error [STORAGE_FAILED]: the output: No space left on device"
    assert len(error.splitlines()) == 2


def test_what_a_terminal_cannot_show_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "märchen"
    words = ("ls", "--shards-dir", str(folder), "--models-dir", str(tmp_path / "✓"))
    assert shardmesh(*words, PYTHONIOENCODING="ascii")[0] == 0


def test_a_folder_that_is_gone_is_told_of(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with contextlib.chdir(folder):
        folder.rmdir()
        with pytest.raises(InputError, match="the current folder cannot be used"):
            require_folder()


def test_a_variable_that_is_not_text_is_named() -> None:
    with pytest.raises(InputError, match="LLAMA_CLUSTER is not UTF-8"):
        require_text([], [("HOME", "\udcff"), ("LLAMA_CLUSTER", "\udcff")])


def test_what_the_system_refuses_is_found_in_groups() -> None:
    full = OSError(errno.ENOSPC, "full")
    found = of_machine(BaseExceptionGroup("", [BaseExceptionGroup("", [full])]))
    assert str(found) == "the output: No space left on device"
    named = of_machine(OSError(errno.EACCES, "", "/there"))
    assert str(named) == "/there: Permission denied"


def test_a_defect_stays_one() -> None:
    assert of_machine(ValueError()) is None
    assert of_machine(OSError(errno.EBADF, "")) is None
    assert of_machine(ExceptionGroup("", [OSError(errno.EIO, ""), ValueError()])) is None


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_only_numbers_to_count_with(text: str) -> None:
    with pytest.raises(click.BadParameter):
        FiniteRange().convert(text, None, None)
    assert FiniteRange(0, 1).convert("0.5", None, None) == 0.5


def test_an_error_without_a_command_still_names_one() -> None:
    assert "`shardmesh --help`" in of_command_line(click.UsageError("no")).next_step


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ("{", "BAD_JSON"),
        ('{"shard_id": NaN}', "BAD_JSON"),
        ('{"shard_id": "x"}', "BAD_MESSAGE"),
        ("[]", "BAD_MESSAGE"),
    ],
)
def test_parameters_that_cannot_be_sent_have_a_next_step(parameters: str, code: str) -> None:
    words = ("command", "some-peer", "LOAD_SHARD", parameters, "--public")
    _, _, error = shardmesh(*words)
    first, second = error.splitlines()
    assert first.startswith(f"Error [{code}]: ")
    assert second.startswith("  next step: ")


def test_a_listener_says_where_it_cannot_listen_before_anything_else(tmp_path: Path) -> None:
    words = ("listen", "--public", "--shard-id", "0", "--listen-addr", "nope")
    folders = (f"--{name}-dir={tmp_path / name}" for name in ("state", "shards", "models"))
    code, output, error = shardmesh(*words, *folders)
    assert (code, output) == (2, "")
    assert error.startswith(
        "Error [BAD_INPUT]: 'nope' is no IP address to listen on\n  next step: "
    )
    assert list(tmp_path.iterdir()) == []
