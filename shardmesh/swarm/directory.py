"""What a node knows of the listeners of its cluster, and how neighbours tell each other.

The bootstrap and every listener keep a directory and serve it, so a change is known everywhere
after one hop, without the DHT.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import trio

from shardmesh.errors import ProtocolError, RefusedError
from shardmesh.swarm.host import Host
from shardmesh.swarm.streams import ByteStream, receive_message, send_message
from shardmesh.wire.announcement import (
    DIRECTORY_PROTOCOL,
    Announcement,
    DirectoryRequest,
    DirectoryResponse,
    check_not_ahead,
    open_signed,
)
from shardmesh.wire.codec import decode_cbor, encode_cbor
from shardmesh.wire.limits import (
    ANNOUNCEMENT_LIFETIME_MAX_S,
    COMMAND_TIMEOUT_S,
    DIRECTORY_ENTRIES_MAX,
    DIRECTORY_REQUEST_BYTES_MAX,
    DIRECTORY_RESPONSE_BYTES_MAX,
    REQUEST_READ_TIMEOUT_S,
)

_log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Entry:
    announcement: Announcement
    signed: bytes
    reachable: bool = True

    def is_over(self, now_s: float) -> bool:
        """Whether it can be forgotten; a withdrawal outlives all that it takes back."""
        if self.announcement.is_withdrawal:
            return self.announcement.issued_at_s + ANNOUNCEMENT_LIFETIME_MAX_S <= now_s
        return self.announcement.expires_at_s <= now_s


class Directory:
    """The newest announcement of each listener of one cluster; expired ones go by themselves.

    `wall_clock` gives seconds since 1970, as in the announcements.
    """

    def __init__(self, cluster: str, wall_clock: Callable[[], float] = time.time) -> None:
        self.cluster = cluster
        self.wall_clock = wall_clock
        self.version = 0
        """Rises with each change."""
        self.admits: Callable[[str], bool] = lambda peer_id: True
        """Says of a peer id whether its announcements are taken in at all."""
        self.n_refused: Counter[str] = Counter()
        """Announcements of neighbours that were not believed, by error code."""
        self._entries: dict[str, _Entry] = {}
        self._changed = trio.Event()

    def update(self, signed: bytes) -> bool:
        """Takes in a signed announcement or withdrawal; says whether it changed anything.

        Raises ProtocolError (theirs) for a forged, foreign or expired one.
        """
        if any(entry.signed == signed for entry in self._entries.values()):
            return False
        announcement = open_signed(signed)
        now_s = self.wall_clock()
        entry = _Entry(announcement, signed)
        if announcement.cluster != self.cluster:
            raise ProtocolError(f"an announcement for cluster {announcement.cluster!r}")
        check_not_ahead(announcement, now_s)
        if entry.is_over(now_s):
            raise ProtocolError("an announcement has expired", code="EXPIRED")
        if not self.admits(announcement.peer_id):
            return False
        known = self._entries.get(announcement.peer_id)
        if known is not None and known.announcement.sequence >= announcement.sequence:
            return False
        if known is None and len(self._entries) >= DIRECTORY_ENTRIES_MAX:
            self._forget_over(now_s)
            if len(self._entries) >= DIRECTORY_ENTRIES_MAX:
                _log.warning("the directory is full; %s is not taken in", announcement.peer_id)
                return False
        self._entries[announcement.peer_id] = entry
        self._tell()
        return True

    def get(self, peer_id: str) -> Announcement | None:
        """The timely announcement of a listener that is not known to be unreachable."""
        entry = self._entries.get(peer_id)
        return entry.announcement if entry is not None and self._is_live(entry) else None

    def hidden(self, peer_id: str) -> Announcement | None:
        """The timely announcement of a listener that is thought to be unreachable."""
        entry = self._entries.get(peer_id)
        if entry is None or entry.reachable or entry.is_over(self.wall_clock()):
            return None
        return None if entry.announcement.is_withdrawal else entry.announcement

    def has_left(self, peer_id: str) -> bool:
        """Whether a listener has taken its announcement back, as one does that ends in order."""
        entry = self._entries.get(peer_id)
        return entry is not None and entry.announcement.is_withdrawal

    def sequence_of(self, peer_id: str) -> int:
        """That of the newest word of a listener, a withdrawal included; 0 if there is none."""
        entry = self._entries.get(peer_id)
        return entry.announcement.sequence if entry is not None else 0

    def all(self) -> list[Announcement]:
        """All that can be believed now, by shard and peer id."""
        live = [entry.announcement for entry in self._entries.values() if self._is_live(entry)]
        return sorted(live, key=lambda a: (a.shard_id, a.peer_id))

    def all_signed(self) -> list[bytes]:
        """What is handed over to neighbours: all that `all` gives, and recent withdrawals."""
        return list(self.signed_by_node().values())

    def signed_by_node(self) -> dict[str, bytes]:
        """What `all_signed` gives, by peer id."""
        self._forget_over(self.wall_clock())
        return {
            peer_id: entry.signed
            for peer_id, entry in self._entries.items()
            if entry.reachable or entry.announcement.is_withdrawal
        }

    def live_but(self, known: Collection[bytes]) -> list[str]:
        """Peer ids of live entries whose signed bytes are not among the known ones."""
        signed = set(known)
        return [
            peer_id
            for peer_id, entry in self._entries.items()
            if self._is_live(entry) and entry.signed not in signed
        ]

    def withdraw(self, peer_id: str) -> None:
        """Forgets a listener at once, on this node only."""
        if self._entries.pop(peer_id, None) is not None:
            self._tell()

    def mark_unreachable(self, peer_id: str) -> None:
        """Hides a listener until it is heard of again."""
        self._mark(peer_id, reachable=False)

    def mark_reachable(self, peer_id: str) -> None:
        """Shows a listener again that was hidden."""
        self._mark(peer_id, reachable=True)

    async def wait_changed(self, since: int | None = None) -> int:
        """Waits until `version` is beyond `since` (default: now) and gives it.

        Expiry alone is no change.
        """
        since = self.version if since is None else since
        while self.version <= since:
            await self._changed.wait()
        return self.version

    def _mark(self, peer_id: str, *, reachable: bool) -> None:
        entry = self._entries.get(peer_id)
        if entry is not None and entry.reachable != reachable:
            entry.reachable = reachable
            self._tell()

    def _is_live(self, entry: _Entry) -> bool:
        """A withdrawal never is, also one of a node whose clock is a little ahead."""
        is_shown = entry.reachable and not entry.announcement.is_withdrawal
        return is_shown and not entry.is_over(self.wall_clock())

    def _forget_over(self, now_s: float) -> None:
        for peer_id in [p for p, entry in self._entries.items() if entry.is_over(now_s)]:
            del self._entries[peer_id]

    def _tell(self) -> None:
        self.version += 1
        self._changed.set()
        self._changed = trio.Event()


def serve_directory(host: Host, directory: Directory) -> None:
    """Lets neighbours push into the directory and pull from it."""

    async def serve(stream: ByteStream, peer_id: str) -> None:
        with trio.fail_after(REQUEST_READ_TIMEOUT_S):
            data = await receive_message(stream, DIRECTORY_REQUEST_BYTES_MAX)
        request = decode_cbor(data, DirectoryRequest)
        known: tuple[bytes, ...] = ()
        if request.cluster == directory.cluster:
            take_in(directory, request.push, peer_id)
            known = tuple(directory.all_signed()) if request.pull else ()
        answer = DirectoryResponse(cluster=directory.cluster, announcements=known)
        await send_message(stream, encode_cbor(answer))

    host.serve(DIRECTORY_PROTOCOL, serve)


async def exchange(
    host: Host,
    directory: Directory,
    peer_id: str,
    *,
    push: Sequence[bytes] = (),
    pull: bool = True,
    timeout_s: float = COMMAND_TIMEOUT_S,
) -> list[str]:
    """Hands announcements to a neighbour and takes in what it knows.

    Gives, after a pull, the peer ids of live entries that the neighbour does not know like that: it
    may have found that they are gone.
    Raises UnreachableError (the moment's), RefusedError (theirs) if it keeps no directory or is
    of another cluster (OTHER_CLUSTER), ProtocolError (theirs) for an answer that is none.
    """
    request = DirectoryRequest(cluster=directory.cluster, push=tuple(push), pull=pull)
    answer = await host.request(
        peer_id,
        DIRECTORY_PROTOCOL,
        encode_cbor(request),
        timeout_s=timeout_s,
        response_bytes_max=DIRECTORY_RESPONSE_BYTES_MAX,
    )
    response = decode_cbor(answer, DirectoryResponse)
    if response.cluster != directory.cluster:
        raise RefusedError(
            f"the node belongs to the cluster {response.cluster!r}, not {directory.cluster!r}",
            code="OTHER_CLUSTER",
            next_step=f"give --cluster {response.cluster}, or the bootstrap of your own cluster",
        )
    take_in(directory, response.announcements, peer_id)
    return directory.live_but(response.announcements) if pull else []


def take_in(directory: Directory, signed: Sequence[bytes], teller: str) -> None:
    """Updates the directory with what a neighbour tells; what cannot be believed is left out."""
    for data in signed:
        try:
            directory.update(data)
        except ProtocolError as error:
            directory.n_refused[error.code] += 1
            _log.info("%s told of an announcement that is not taken in: %s", teller, error)
