from __future__ import annotations

import contextlib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from shardmesh.cli.config_file import config_option
from shardmesh.cli.options import (
    bootstrap_option,
    cluster_option,
    naming,
    naming_options,
    state_dir_option,
)


@click.command("listen")
@bootstrap_option
@cluster_option
@state_dir_option
@click.option("--port", type=int, default=0)
@config_option
def show(bootstrap: tuple[str, ...], cluster: str, state_dir: Path, port: int) -> None:
    click.echo(f"{','.join(bootstrap)} {cluster} {port}")


def run(tmp_path: Path, toml: str | None, *flags: str, **variables: str) -> tuple[int, str]:
    if toml is not None:
        (tmp_path / "shardmesh.toml").write_text(toml)
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(show, flags, env=variables, prog_name="listen")
    return result.exit_code, result.output.strip()


def test_defaults(tmp_path: Path) -> None:
    assert run(tmp_path, None) == (0, "/ip4/127.0.0.1/tcp/51820 llama-cluster 0")


def test_flag_beats_variable_beats_file(tmp_path: Path) -> None:
    toml = 'cluster = "of-file"\n[listen]\nport = 7\n'
    assert run(tmp_path, toml)[1].endswith("of-file 7")
    assert run(tmp_path, toml, LLAMA_CLUSTER="of-variable")[1].endswith("of-variable 7")
    flags = ("--cluster", "of-flag", "--port", "8")
    assert run(tmp_path, toml, *flags, LLAMA_CLUSTER="of-variable")[1].endswith("of-flag 8")


def test_several_bootstraps(tmp_path: Path) -> None:
    assert run(tmp_path, None, LLAMA_BOOTSTRAP="/a, /b\n/c")[1].startswith("/a,/b,/c ")
    assert run(tmp_path, 'bootstrap = ["/a", "/b"]')[1].startswith("/a,/b ")
    assert run(tmp_path, 'bootstrap = "/a"')[1].startswith("/a ")
    assert run(tmp_path, None, "--bootstrap", "/a", "--bootstrap", "/b")[1].startswith("/a,/b ")


def test_tables_of_other_commands_are_left_alone(tmp_path: Path) -> None:
    assert run(tmp_path, "[bootstrap]\nanything = 1\n")[0] == 0


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("clutser = 'x'", "unknown key 'clutser'"),
        ("[listen]\nprot = 1", "unknown key 'prot' in [listen]"),
        ("[lisden]\nport = 1", "unknown key 'lisden'"),
        ("cluster =", "not valid TOML"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, toml: str, message: str) -> None:
    code, output = run(tmp_path, toml)
    assert code == 2
    assert message in " ".join(output.split())


def test_missing_file_is_said(tmp_path: Path) -> None:
    code, output = run(tmp_path, None, "--config", "nowhere.toml")
    assert code == 2
    assert "nowhere.toml" in output


@click.command("listen")
@naming_options
@config_option
def show_names(node_name: str, node_location: str, node_tags: tuple[str, ...]) -> None:
    wanted = naming(node_name, node_location, node_tags)
    click.echo(f"{wanted.name}|{wanted.location}|{','.join(wanted.tags)}|{wanted.old_id}")


def names(tmp_path: Path, toml: str, *flags: str, **variables: str) -> str:
    (tmp_path / "shardmesh.toml").write_text(toml)
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(show_names, flags, env=variables, prog_name="listen")
    return result.output.strip()


def test_names_of_a_node(tmp_path: Path) -> None:
    toml = '[node.identity]\nname = "cellar"\nlocation = "Ulm"\ntags = ["gpu", "old"]\n'
    assert names(tmp_path, toml, NODE_ID="node-7") == "cellar|Ulm|gpu,old|node-7"
    assert names(tmp_path, toml, NODE_NAME="attic", NODE_TAGS="a, b") == "attic|Ulm|a,b|"
    assert names(tmp_path, toml, "--name", "roof", "--tag", "c", NODE_NAME="x") == "roof|Ulm|c|"
    assert "unknown key 'nmae'" in names(tmp_path, '[node.identity]\nnmae = "x"\n')


@click.command("listen")
@naming_options
@click.option("--max-tokens", "n_tokens_max", type=int, default=0)
@config_option
def show_keys(
    node_name: str, node_location: str, node_tags: tuple[str, ...], n_tokens_max: int
) -> None:
    click.echo(f"{node_name} {node_tags} {n_tokens_max}")


def run_keys(tmp_path: Path, toml: str) -> tuple[int, str]:
    (tmp_path / "shardmesh.toml").write_text(toml)
    with contextlib.chdir(tmp_path):
        result = CliRunner().invoke(show_keys, (), prog_name="listen")
    return result.exit_code, result.output.strip()


def test_a_key_may_be_the_name_of_the_flag(tmp_path: Path) -> None:
    for key in ("max_tokens", "max-tokens", "n_tokens_max"):
        assert run_keys(tmp_path, f"[listen]\n{key} = 7\n") == (0, "() 7"), key


def test_one_word_is_a_list_of_one(tmp_path: Path) -> None:
    assert run_keys(tmp_path, '[listen]\ntag = "gpu"\n')[1] == "('gpu',) 0"
    assert run_keys(tmp_path, '[node.identity]\ntags = ["a", "b"]\n')[1] == "('a', 'b') 0"


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[listen]\ntag = 7\n", "'node_tags' takes a text or a list of texts"),
        ("[listen]\nname = ['a']\n", "'node_name' takes one value"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(tmp_path: Path, toml: str, message: str) -> None:
    code, output = run_keys(tmp_path, toml)
    assert code == 2
    assert message in " ".join(output.split())
