"""`shardmesh split` as a person uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.models import BUILT_IN, write_model
from support.rule_models import write_rule_model

from shardmesh.cli.split import command, parse_counts, parse_sizes
from shardmesh.errors import InputError
from shardmesh.shards.manifest import read_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", vocabulary=BUILT_IN, n_layer=6, name="Tale")


def run(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(command, [str(each) for each in arguments], env=environment)


def test_it_splits_and_says_so(model: Path, tmp_path: Path) -> None:
    result = run(model, "--shards", 3, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "3 shards of 'Tale'" in result.stderr
    assert read_manifest(tmp_path / "out" / "manifest.json").model_name == "Tale"


def test_folder_and_name_can_be_chosen(model: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "elsewhere")
    assert run(model, "--layers", "1,2,3", "--name", "x", LLAMA_SHARDS_DIR=out).exit_code == 0
    manifest = read_manifest(tmp_path / "elsewhere" / "manifest.json")
    assert [shard.layers.n_layer for shard in manifest.shards] == [1, 2, 3]
    assert manifest.model_name == "x"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--shards", "2"), 64),
        (("--shards", "3"), 32),
        (("--shards", "3", "--piece-tokens", "auto"), 32),
        (("--layers", "1,5", "--piece-tokens", "256"), 256),
    ],
)
def test_the_length_of_pieces_is_in_the_manifest(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], expected: int
) -> None:
    result = run(model, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert f"prompts go in pieces of {expected} tokens" in result.stderr
    assert read_manifest(tmp_path / "out" / "manifest.json").piece_tokens == expected


def test_a_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = run(model, "--memory", "4G,8G", "--dry-run", "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "6 layers in 2 shards" in result.stdout
    assert "tokens cached" in result.stdout
    assert "GiB" in result.stdout or "MiB" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--shards", "7"), "cannot be cut into 7"),
        (("--shards", "0"), "cannot be cut into 0"),
        (("--layers", "1,2"), "adds up to 3"),
        (("--layers", "1;2"), "not a list of layer counts"),
        (("--memory", "1M,1M"), "does not fit"),
        (("--memory", "much"), "not a list of memory sizes"),
        (("--shards", "2", "--layers", "3,3"), "exclude each other"),
        (("--piece-tokens", "48"), "power of two from 16 to 512"),
        (("--piece-tokens", "1024"), "power of two from 16 to 512"),
    ],
)
def test_wrong_input_is_one_sentence_and_leaves_nothing(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    result = run(model, *arguments, "--out", tmp_path / "out")
    assert isinstance(result.exception, InputError)
    assert sentence in str(result.exception)
    assert result.exception.next_step
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_sizes_and_counts_are_understood() -> None:
    assert parse_sizes("8G, 1.5GiB,512M,1024,2k") == (
        8 * 2**30,
        3 * 2**29,
        512 * 2**20,
        1024,
        2048,
    )
    assert parse_counts("8, 8,10,6") == (8, 8, 10, 6)


@pytest.mark.parametrize("text", ["", "8G,", "-1G", "0G", "1e9G", "8X", "inf", "9" * 99])
def test_nonsense_sizes_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_sizes(text)


def test_an_illegal_list_is_refused_before_anything_is_planned(tmp_path: Path) -> None:
    model = write_rule_model(tmp_path / "smollm3.gguf", "smollm3")
    result = run(model, "--layers", "3,5", "--dry-run")
    assert isinstance(result.exception, InputError)
    assert result.exception.next_step == "use --layers 4,4"
