"""Who may connect with a private mesh's BitTorrent: the addresses of members.  Pure.

BitTorrent knows no identities, so this goes by IP address.  Whoever takes part in a file has asked
about it, or was asked, over /torrent/1.0 before, where only members get in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from shardmesh.wire.limits import KNOWN_NODES_MAX, TORRENT_MEMBER_S


@dataclasses.dataclass(frozen=True)
class _Member:
    hosts: frozenset[str]
    until_s: float


class Gate:
    """The addresses that are let in; times are monotonic."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}

    def note(self, peer_id: str, hosts: Collection[str], now_s: float) -> None:
        """A member has asked or was asked, and these are its addresses.

        Without any it comes through a relay, and nobody can tell where its connections come from.
        """
        self._members.pop(peer_id, None)
        while len(self._members) >= KNOWN_NODES_MAX:
            del self._members[next(iter(self._members))]  # whoever was silent longest
        self._members[peer_id] = _Member(frozenset(hosts), now_s + TORRENT_MEMBER_S)

    def forget(self, peer_ids: Collection[str]) -> None:
        """These are no members any more."""
        for peer_id in peer_ids:
            self._members.pop(peer_id, None)

    def hosts(self, now_s: float) -> frozenset[str] | None:
        """The addresses that are let in now; None for all, because of a member behind a relay."""
        for peer_id, member in list(self._members.items()):
            if member.until_s <= now_s:
                del self._members[peer_id]
        if any(not member.hosts for member in self._members.values()):
            return None
        return frozenset(host for member in self._members.values() for host in member.hosts)
