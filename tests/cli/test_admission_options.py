"""Where a command finds the secret of its cluster, and what it says when there is none."""

from __future__ import annotations

import dataclasses
import stat
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from shardmesh.cli.admission import (
    bootstrap_admission,
    client_admission,
    command_rights,
    listener_admission,
)
from shardmesh.cli.options import cluster_option, state_dir_option
from shardmesh.errors import InputError
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.cluster_files import ClusterFiles
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.rights import Rights
from shardmesh.wire.cluster_secret import ClusterSecret, new_secret, parse_secret

SECRET = new_secret(new_identity().public_key)
KEPT = new_secret(new_identity().public_key)


@dataclasses.dataclass
class Taken:
    admission: Admission | None = None
    rights: Rights | None = None


TAKEN = Taken()


@click.command("run")
@cluster_option
@client_admission
def client(cluster: str, admission: Admission) -> None:
    TAKEN.admission = admission


@click.command("listen")
@cluster_option
@listener_admission
@state_dir_option
def listener(cluster: str, admission: Admission, state_dir: Path) -> None:
    TAKEN.admission = admission


@click.command("bootstrap")
@cluster_option
@bootstrap_admission
@state_dir_option
def bootstrap(cluster: str, admission: Admission, state_dir: Path) -> None:
    TAKEN.admission = admission


def invoke(command: click.Command, state: Path, *flags: str, **variables: str) -> Result:
    TAKEN.admission = None
    return CliRunner().invoke(
        command, ["--state-dir", str(state), *flags], env=variables, catch_exceptions=False
    )


def taken(command: click.Command, state: Path, *flags: str, **variables: str) -> ClusterSecret:
    result = invoke(command, state, *flags, **variables)
    assert result.exit_code == 0, result.output
    assert TAKEN.admission is not None
    assert TAKEN.admission.secret is not None
    return TAKEN.admission.secret


def test_flag_beats_file_beats_kept(tmp_path: Path) -> None:
    ClusterFiles(tmp_path, "llama-cluster").keep(KEPT)
    file = tmp_path / "given"
    file.write_text(SECRET.text())
    file.chmod(0o600)
    other = new_secret(new_identity().public_key)
    for command in (client, listener, bootstrap):
        assert taken(command, tmp_path / "x", LLAMA_SECRET=KEPT.text()) == KEPT
    assert taken(client, tmp_path) == KEPT
    assert taken(client, tmp_path, "--secret-file", str(file)) == SECRET
    assert taken(client, tmp_path, LLAMA_SECRET_FILE=str(file)) == SECRET
    variable = {"LLAMA_SECRET": other.text()}
    assert taken(client, tmp_path, "--secret-file", str(file), **variable) == SECRET
    assert taken(client, tmp_path, "--secret", other.text(), LLAMA_PUBLIC="1") == other


def test_the_secret_of_another_cluster_is_not_taken(tmp_path: Path) -> None:
    ClusterFiles(tmp_path, "home").keep(KEPT)
    assert taken(client, tmp_path, "--cluster", "home") == KEPT
    with pytest.raises(InputError) as caught:
        invoke(client, tmp_path, "--cluster", "work")
    assert caught.value.code == "NO_SECRET"
    assert "'work'" in str(caught.value)
    assert "--public" in caught.value.next_step


def test_only_a_bootstrap_makes_one(tmp_path: Path) -> None:
    for command in (client, listener):
        with pytest.raises(InputError, match="no secret of the cluster"):
            invoke(command, tmp_path)
    made = taken(bootstrap, tmp_path)
    assert taken(bootstrap, tmp_path) == taken(client, tmp_path) == made
    path = ClusterFiles(tmp_path, "llama-cluster").secret_path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_public_is_said_and_not_remembered(tmp_path: Path) -> None:
    ClusterFiles(tmp_path, "llama-cluster").keep(KEPT)
    assert invoke(client, tmp_path, "--public").exit_code == 0
    assert TAKEN.admission is not None
    assert TAKEN.admission.is_public
    assert taken(client, tmp_path) == KEPT


def test_public_and_a_secret_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--secret and --public contradict each other"):
        invoke(client, tmp_path, "--public", "--secret", SECRET.text())
    assert invoke(client, tmp_path, "--public", LLAMA_SECRET=SECRET.text()).exit_code == 0


def test_a_secret_on_the_command_line_is_warned_of(tmp_path: Path) -> None:
    result = invoke(client, tmp_path, "--secret", SECRET.text())
    assert "Other users of this machine can see a command line" in result.output
    assert SECRET.text() not in result.output
    assert invoke(client, tmp_path, LLAMA_SECRET=SECRET.text()).output == ""


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "given"
    file.write_text(SECRET.text())
    file.chmod(0o644)
    with pytest.raises(InputError) as caught:
        invoke(client, tmp_path, "--secret-file", str(file))
    assert caught.value.next_step == f"chmod 600 {file}"


def test_a_given_secret_is_kept_when_it_has_proven_right(tmp_path: Path) -> None:
    ClusterFiles(tmp_path, "llama-cluster").keep(KEPT)
    assert taken(client, tmp_path, LLAMA_SECRET=SECRET.text()) == SECRET
    assert TAKEN.admission is not None
    assert ClusterFiles(tmp_path, "llama-cluster").secret() == KEPT, "it may be a mistake"
    TAKEN.admission.note_proven()
    assert ClusterFiles(tmp_path, "llama-cluster").secret() == SECRET


def test_the_secret_of_another_mesh_of_that_name_is_not_lost(tmp_path: Path) -> None:
    files = ClusterFiles(tmp_path, "llama-cluster")
    owner = new_identity().public_key
    first, changed = new_secret(owner), new_secret(owner)
    for secret in (first, changed, KEPT, SECRET):
        files.keep(secret)
    kept = {path.read_text().strip() for path in (tmp_path / "clusters").iterdir()}
    assert kept == {changed.text(), KEPT.text(), SECRET.text()}, "what its owner has replaced is"
    assert files.secret() == SECRET


@pytest.mark.parametrize("name", ["", " ", "blank ", "two\nlines", "x" * 129])
def test_a_name_that_others_could_not_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="the name of a cluster has 1 to 128"):
        invoke(client, tmp_path, "--cluster", name)


@pytest.mark.parametrize("name", ["..", "a/b", "ü" * 90, "x" * 300, "", ".hidden", "a\0b"])
def test_any_name_of_a_cluster_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    made = ClusterFiles(tmp_path, name).make()
    assert ClusterFiles(tmp_path, name).secret() == made
    assert len(list((tmp_path / "clusters").iterdir())) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "clusters"]


def test_the_lists_of_a_node(tmp_path: Path) -> None:
    one, other = new_identity().peer_id, new_identity().peer_id
    secret = {"LLAMA_SECRET": SECRET.text()}
    invoke(listener, tmp_path, "--allow", one, "--deny", other, **secret)
    assert TAKEN.admission is not None
    assert (TAKEN.admission.admits(one), TAKEN.admission.admits(other)) == (True, False)
    with pytest.raises(InputError, match="is no peer id"):
        invoke(listener, tmp_path, "--deny", "somebody", **secret)


def test_the_text_in_the_file_is_the_secret(tmp_path: Path) -> None:
    made = ClusterFiles(tmp_path, "home").make()
    assert parse_secret(ClusterFiles(tmp_path, "home").secret_path.read_text()) == made


@click.command("listen")
@cluster_option
@listener_admission
@command_rights
@state_dir_option
def entitled(cluster: str, admission: Admission, rights: Rights, state_dir: Path) -> None:
    TAKEN.rights = rights


def test_in_a_public_mesh_nobody_may_change_anything_unless_named(tmp_path: Path) -> None:
    admin, other = new_identity().peer_id, new_identity().peer_id
    secret = {"LLAMA_SECRET": SECRET.text()}
    for flags, variables, expected in (
        ((), secret, (True, True)),
        (("--public",), {}, (False, False)),
        (("--public", "--allow-commands", admin), {}, (True, False)),
        (("--allow-commands", "nobody"), secret, (False, False)),
    ):
        assert invoke(entitled, tmp_path, *flags, **variables).exit_code == 0
        assert TAKEN.rights is not None
        changing = TAKEN.rights.changing
        assert (changing.has(admin), changing.has(other)) == expected
        assert TAKEN.rights.inference.has(other)
