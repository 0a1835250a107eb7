"""The options that say which mesh a command may enter, and the secret behind them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from shardmesh.cli.options import Command, state_dir_option
from shardmesh.errors import InputError

if TYPE_CHECKING:
    from shardmesh.swarm.admission import Admission
    from shardmesh.swarm.cluster_files import ClusterFiles
    from shardmesh.wire.cluster_secret import ClusterSecret


def client_admission(command: Command) -> Command:
    """--secret, --secret-file, --public and --state-dir as `admission`."""
    return _with_admission(command, lists=False, makes_secret=False, own_state_dir=True)


def gateway_admission(command: Command) -> Command:
    """--secret, --secret-file and --public as `admission`, beside the command's own --state-dir."""
    return _with_admission(command, lists=False, makes_secret=False, own_state_dir=False)


def listener_admission(command: Command) -> Command:
    """--secret, --secret-file, --public, --allow and --deny as `admission`."""
    return _with_admission(command, lists=True, makes_secret=False, own_state_dir=False)


def bootstrap_admission(command: Command) -> Command:
    """As `listener_admission`, but the secret is made if there is none."""
    return _with_admission(command, lists=True, makes_secret=True, own_state_dir=False)


def command_rights(command: Command) -> Command:
    """--allow-commands and --allow-inference as `rights`; to stand below the admission."""

    @functools.wraps(command)
    def entitled(
        *,
        allow_commands: tuple[str, ...],
        allow_inference: tuple[str, ...],
        admission: Admission,
        **others: Any,
    ) -> Any:
        from shardmesh.swarm.rights import MEMBERS, NOBODY, Rights, whom

        changing = whom(allow_commands, NOBODY if admission.is_public else MEMBERS)
        rights = Rights(changing, whom(allow_inference))
        return command(admission=admission, rights=rights, **others)

    for option in _RIGHTS_OPTIONS:
        entitled = option(entitled)
    return entitled  # type: ignore[return-value]


def identity_option(command: Command) -> Command:
    """--identity-file as `identity_file`: for a client that others are to know again."""
    return click.option(
        "--identity-file",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Key of this client, made if missing.  [default: a new one each time]",
    )(command)


def _with_admission(
    command: Command, *, lists: bool, makes_secret: bool, own_state_dir: bool
) -> Command:
    @functools.wraps(command)
    def admitted(
        *,
        secret: str | None,
        secret_file: Path | None,
        public: bool,
        state_dir: Path,
        allow: tuple[str, ...] = (),
        deny: tuple[str, ...] = (),
        **others: Any,
    ) -> Any:
        from shardmesh.swarm.admission import Admission
        from shardmesh.swarm.cluster_files import ClusterFiles

        if not own_state_dir:
            others["state_dir"] = state_dir
        cluster = others["cluster"]
        given = strongest({"secret": secret, "secret_file": secret_file, "public": public})
        files = ClusterFiles(state_dir, cluster)
        chosen = choose_secret(files, given)
        if chosen is None and "public" not in given:
            chosen = files.make() if makes_secret else missing_secret(cluster)
        admission = Admission(chosen, allowed=allow, denied=deny, files=files)
        return command(admission=admission, **others)

    options = [*_LIST_OPTIONS] if lists else []
    options += [*_SECRET_OPTIONS]
    for option in options:
        admitted = option(admitted)
    if own_state_dir:
        admitted = state_dir_option(admitted)
    return admitted  # type: ignore[return-value]


_SECRET_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--public",
        is_flag=True,
        envvar="LLAMA_PUBLIC",
        help="A mesh without a secret: whoever reaches it may use it and read prompts.",
    ),
    click.option(
        "--secret-file",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="LLAMA_SECRET_FILE",
        help="File with the cluster's secret, which only you may read.",
    ),
    click.option(
        "--secret",
        envvar="LLAMA_SECRET",
        help="Secret of the cluster, as `bootstrap` prints it.  [default: the one kept for it]",
    ),
)
_LIST_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--deny",
        multiple=True,
        envvar="LLAMA_DENY",
        help="Peer id that is turned away; may be given several times.",
    ),
    click.option(
        "--allow",
        multiple=True,
        envvar="LLAMA_ALLOW",
        help="Peer id that is let in, and no other; may be given several times.",
    ),
)


_RIGHTS_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--allow-inference",
        multiple=True,
        envvar="LLAMA_ALLOW_INFERENCE",
        help="Who may send INFERENCE: members, nobody, or a peer id; may be given several times.  "
        "[default: members]",
    ),
    click.option(
        "--allow-commands",
        multiple=True,
        envvar="LLAMA_ALLOW_COMMANDS",
        help="Who may send LOAD_SHARD and the like: members, nobody, or a peer id; may be given "
        "several times.  [default: members, in a public mesh nobody]",
    ),
)


def strongest(values: dict[str, Any]) -> dict[str, Any]:
    """Of several options that say the same thing, those given in the strongest way.

    A flag is stronger than a variable, which is stronger than the file, whatever their names.
    """
    context = click.get_current_context()
    sources = {name: context.get_parameter_source(name) for name, v in values.items() if v}
    for source in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
        if source in sources.values():
            return {name: values[name] for name, s in sources.items() if s == source}
    return {name: values[name] for name in sources}


def choose_secret(files: ClusterFiles, given: dict[str, Any]) -> ClusterSecret | None:
    """The secret that was given, else the one that is kept; None for a public mesh or if none is.

    Raises InputError (theirs) for flags that contradict each other and for what is no secret.
    """
    from shardmesh.swarm.cluster_files import read_secret
    from shardmesh.wire.cluster_secret import parse_secret

    if len(given) > 1:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(
            f"{flags} contradict each other", code="CONTRADICTION", next_step="give one of them"
        )
    if "public" in given:
        return None
    if "secret" in given:
        _warn_of_the_command_line()
        return parse_secret(given["secret"])
    if "secret_file" in given:
        return read_secret(given["secret_file"])
    return files.secret()


def missing_secret(cluster: str) -> NoReturn:
    """Raises InputError (theirs): without a secret nothing can be done."""
    from shardmesh.swarm.admission import SAY_HOW

    raise InputError(
        f"no secret of the cluster {cluster!r} is known here",
        code="NO_SECRET",
        next_step=f"{SAY_HOW}; or --public, if the mesh is",
    )


def _warn_of_the_command_line() -> None:
    source = click.get_current_context().get_parameter_source("secret")
    if source == ParameterSource.COMMANDLINE:
        click.echo(
            "Other users of this machine can see a command line. The secret is kept once it has "
            "proven right; leave --secret out from then on, or use --secret-file.",
            err=True,
        )
