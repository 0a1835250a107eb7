"""Where accepted connections wait until they have shown who they are.

It is bounded in places, in time and in what one address may try in vain.  When all places are
taken, the address that holds most of them loses the one that has waited longest: whoever fills the
room pushes himself out, and a newcomer that is what it should be needs some milliseconds.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections import Counter
from collections.abc import Iterator

import trio

from shardmesh.errors import BusyError
from shardmesh.wire.limits import (
    FAILED_CONNECTIONS_MAX,
    FAILED_CONNECTIONS_PERIOD_S,
    FAILING_ADDRESSES_MAX,
    HANDSHAKE_TIMEOUT_S,
)


class Anteroom:
    """The waiting connections of one port."""

    def __init__(self, n_places: int) -> None:
        self._n_places = n_places
        self._waiting: dict[int, tuple[str, trio.CancelScope]] = {}  # the longest waiting first
        self._n_entered = 0
        self._failures = Failures()

    def __len__(self) -> int:
        return len(self._waiting)

    @contextlib.contextmanager
    def place(self, origin: str) -> Iterator[trio.CancelScope]:
        """Runs the block for HANDSHAKE_TIMEOUT_S at most; it is cancelled to make room, too.

        The connection has shown who it is when the block ends by itself; else it counts as tried
        in vain.  Raises BusyError (the moment's) for an address that has tried too often.
        """
        now_s = trio.current_time()
        self._failures.check(origin, now_s)
        if len(self._waiting) >= self._n_places:
            self._push_one_out()
        self._n_entered += 1
        number = self._n_entered
        has_shown_itself = False
        with trio.move_on_after(HANDSHAKE_TIMEOUT_S) as scope:
            self._waiting[number] = origin, scope
            try:
                yield scope
                has_shown_itself = True
            finally:
                self._waiting.pop(number, None)
                if not has_shown_itself:
                    self._failures.note(origin, trio.current_time())

    def _push_one_out(self) -> None:
        ((greediest, _),) = Counter(origin for origin, _ in self._waiting.values()).most_common(1)
        number = next(n for n, (origin, _) in self._waiting.items() if origin == greediest)
        _, scope = self._waiting.pop(number)
        scope.cancel()


class Failures:
    """Connections that came to nothing, by address; of IPv6 by the /64 that one site has.

    Loopback is left out: other nodes of this machine come from there too.
    """

    def __init__(self) -> None:
        self._failed: dict[str, tuple[float, int]] = {}  # since when, how many

    def check(self, origin: str, now_s: float) -> None:
        """Raises BusyError (the moment's) for an address that has failed too often of late."""
        since_s, n_failed = self._failed.get(_site(origin), (now_s, 0))
        if n_failed >= FAILED_CONNECTIONS_MAX and now_s < since_s + FAILED_CONNECTIONS_PERIOD_S:
            raise BusyError(f"{origin} has tried in vain {n_failed} times")

    def note(self, origin: str, now_s: float) -> None:
        """One more connection from there came to nothing."""
        site = _site(origin)
        if not site:
            return
        since_s, n_failed = self._failed.pop(site, (now_s, 0))
        if now_s >= since_s + FAILED_CONNECTIONS_PERIOD_S:
            since_s, n_failed = now_s, 0
        self._failed[site] = since_s, n_failed + 1
        if len(self._failed) > FAILING_ADDRESSES_MAX:
            del self._failed[next(iter(self._failed))]  # the one that has failed least lately


def _site(origin: str) -> str:
    """What is counted together; empty for what is not counted."""
    try:
        address = ipaddress.ip_address(origin.partition("%")[0])
    except ValueError:
        return ""
    if address.is_loopback:
        return ""
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
