"""Two homes behind NAT and a public network between them, made of network namespaces.

    home-0 -- nat-0 --.
                       pub (203.0.113.1)
    home-1 -- nat-1 --'

Needs Linux, root, `ip` (iproute2) and `iptables`; tests that cannot have them are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

PUBLIC_HOST = "203.0.113.1"
_COMMAND_TIMEOUT_S = 10.0
N_HOMES = 2


class Namespaces:
    """The names of the namespaces; made by `homes_behind_nat`."""

    def __init__(self) -> None:
        self._mark = f"sm{os.getpid()}"
        self.public = self._name("pub")
        self.homes = tuple(self._name(f"home{n}") for n in range(N_HOMES))
        self.nats = tuple(self._name(f"nat{n}") for n in range(N_HOMES))

    def _name(self, what: str) -> str:
        return f"{self._mark}-{what}"

    def inside(self, namespace: str) -> tuple[str, ...]:
        """What stands before a command that is to run there."""
        return ("ip", "netns", "exec", namespace)


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=_COMMAND_TIMEOUT_S)


@contextmanager
def homes_behind_nat() -> Iterator[Namespaces]:
    """The network above; all of it is gone at the end.  Skips the test where it cannot be had."""
    missing = [name for name in ("ip", "iptables") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}")
    names = Namespaces()
    with ExitStack() as stack:
        try:
            for namespace in (names.public, *names.nats, *names.homes):
                _do("ip", "netns", "add", namespace)
                stack.callback(_do, "ip", "netns", "del", namespace)
                _do("ip", "-n", namespace, "link", "set", "lo", "up")
            _connect(names)
        except subprocess.CalledProcessError as error:
            words = error.stderr.decode(errors="replace").strip()
            pytest.skip(f"this machine lets nobody make network namespaces with NAT: {words}")
        yield names


def _connect(names: Namespaces) -> None:
    """One switch in the public namespace, a router and a home on each of its ports."""
    public = names.public
    _do("ip", "-n", public, "link", "add", "switch", "type", "bridge")
    _do("ip", "-n", public, "address", "add", f"{PUBLIC_HOST}/24", "dev", "switch")
    _do("ip", "-n", public, "link", "set", "switch", "up")
    for n, (nat, home) in enumerate(zip(names.nats, names.homes, strict=True)):
        _wire(public, f"port{n}", nat, "wan")
        _do("ip", "-n", public, "link", "set", f"port{n}", "master", "switch")
        _wire(nat, "lan", home, "eth0")
        _do("ip", "-n", nat, "address", "add", f"203.0.113.{10 + n}/24", "dev", "wan")
        # Both homes use the same addresses, as homes do.
        _do("ip", "-n", nat, "address", "add", "192.168.1.1/24", "dev", "lan")
        _do("ip", "-n", home, "address", "add", "192.168.1.20/24", "dev", "eth0")
        _do("ip", "-n", home, "route", "add", "default", "via", "192.168.1.1")
        router = names.inside(nat)
        _do(*router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        _do(*router, "iptables", "-P", "FORWARD", "DROP")
        _do(*router, "iptables", "-A", "FORWARD", "-i", "lan", "-j", "ACCEPT")
        answers = ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
        _do(*router, "iptables", "-A", "FORWARD", "-i", "wan", *answers)
        masquerade = ("-o", "wan", "-j", "MASQUERADE")
        _do(*router, "iptables", "-t", "nat", "-A", "POSTROUTING", *masquerade)


def _wire(one: str, one_end: str, other: str, other_end: str) -> None:
    _do(
        *("ip", "-n", one, "link", "add", one_end, "type", "veth"),
        *("peer", "name", other_end, "netns", other),
    )
    _do("ip", "-n", one, "link", "set", one_end, "up")
    _do("ip", "-n", other, "link", "set", other_end, "up")
