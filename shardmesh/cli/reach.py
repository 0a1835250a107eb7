"""Options that say how a node is reached: relays, forwarded ports, the LAN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from shardmesh.cli.options import AddressType

if TYPE_CHECKING:
    from shardmesh.swarm.reach import ReachOptions

Command = TypeVar("Command", bound=Callable[..., Any])


def listener_reach(command: Command) -> Command:
    """All options of a listener, as `reach`: a ReachOptions."""
    options = (
        _announce_addr(),
        _relay(default=False),
        _no_mdns(),
        click.option(
            "--relay-only",
            is_flag=True,
            envvar="LLAMA_RELAY_ONLY",
            help="Behave as if nobody could dial this node: to try relays out.",
        ),
        click.option(
            "--no-direct",
            is_flag=True,
            envvar="LLAMA_NO_DIRECT",
            help="Send hidden states over libp2p streams only: to try these out.",
        ),
    )
    return _with(options, command)


def bootstrap_reach(command: Command) -> Command:
    """The options of a bootstrap, as `reach`: a ReachOptions."""
    return _with((_announce_addr(), _relay(default=True), _no_mdns()), command)


def _announce_addr() -> Callable[[Command], Command]:
    return click.option(
        "--announce-addr",
        type=AddressType(),
        multiple=True,
        envvar="LLAMA_ANNOUNCE_ADDR",
        help="Multiaddress to announce beside the machine's own, where a router forwards a port.",
    )


def _relay(*, default: bool) -> Callable[[Command], Command]:
    return click.option(
        "--relay/--no-relay",
        default=default,
        show_default=True,
        envvar="LLAMA_RELAY",
        help="Pass bytes on to members that cannot be dialed.",
    )


def _no_mdns() -> Callable[[Command], Command]:
    return click.option(
        "--no-mdns",
        is_flag=True,
        envvar="LLAMA_NO_MDNS",
        help="Do not show this node on the LAN, nor search the mesh there.",
    )


def _with(options: tuple[Callable[[Any], Any], ...], command: Command) -> Command:
    @functools.wraps(command)
    def run(
        *args: Any,
        announce_addr: tuple[str, ...],
        relay: bool,
        no_mdns: bool,
        relay_only: bool = False,
        no_direct: bool = False,
        **others: Any,
    ) -> Any:
        reach = read_reach(
            announce_addr,
            relay=relay,
            mdns=not no_mdns,
            relay_only=relay_only,
            no_direct=no_direct,
        )
        return command(*args, reach=reach, **others)

    wrapped: Any = run
    for option in reversed(options):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def read_reach(
    announced: tuple[str, ...], *, relay: bool, mdns: bool, relay_only: bool, no_direct: bool
) -> ReachOptions:
    """The options as the swarm wants them; InputError (theirs) for what is no address."""
    from shardmesh.errors import InputError
    from shardmesh.swarm.addresses import is_circuit, parse_address
    from shardmesh.swarm.reach import ReachOptions

    addresses = [parse_address(text)[0] for text in announced]
    if any(is_circuit(address) for address in addresses):
        raise InputError(
            "--announce-addr takes no address through a relay",
            next_step="leave it out: a node that cannot be dialed finds a relay by itself",
        )
    return ReachOptions(
        announced=tuple(str(address) for address in addresses),
        offers_relay=relay,
        mdns=mdns,
        relay_only=relay_only,
        direct_links=not (no_direct or relay_only),
    )
