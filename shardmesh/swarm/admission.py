"""Who is let in: nodes that prove the cluster's secret and that no list excludes.

The decision alone; `swarm/noise.py` makes the handshake that carries it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Final

from shardmesh.errors import InputError, ProtocolError, RefusedError, ShardmeshError
from shardmesh.swarm.cluster_files import ClusterFiles
from shardmesh.wire.cluster_secret import ClusterSecret
from shardmesh.wire.cluster_update import ClusterUpdate, open_update
from shardmesh.wire.peer_id import is_peer_id

_log = logging.getLogger(__name__)

SAY_HOW: Final = (
    "give --secret or --secret-file, as in the line that `shardmesh bootstrap` printed, "
    "or LLAMA_SECRET"
)


class Admission:
    """What a node asks of others before it speaks with them.

    Without a secret the mesh is public: whoever is not denied gets in.  With `files` the secret is
    kept when another node has proven that it is right, and so are later changes of it.
    """

    def __init__(
        self,
        secret: ClusterSecret | None,
        *,
        allowed: Iterable[str] = (),
        denied: Iterable[str] = (),
        files: ClusterFiles | None = None,
    ) -> None:
        """Raises InputError (theirs) for an entry of the lists that is no peer id."""
        self.secret = secret
        self.allowed = frozenset(allowed)
        self.denied = frozenset(denied)
        self.files = files
        self.n_refused: Counter[str] = Counter()
        """Nodes that came and were not let in, by error code."""
        self._is_proven = False
        self._last_sequence = -1
        for peer_id in self.allowed | self.denied:
            if not is_peer_id(peer_id):
                raise InputError(
                    f"{peer_id[:100]!r} is no peer id",
                    next_step="give it whole, as the node prints it: `Peer ID: ...`",
                )

    @property
    def is_public(self) -> bool:
        return self.secret is None

    def admits(self, peer_id: str) -> bool:
        """Whether the lists let this node in; an empty list of the allowed allows everybody."""
        return peer_id not in self.denied and (not self.allowed or peer_id in self.allowed)

    def note_proven(self) -> None:
        """Another node has the same secret, so it is worth keeping."""
        if self._is_proven or self.files is None or self.secret is None:
            return
        self._is_proven = True
        try:
            self.files.keep(self.secret)
        except ShardmeshError as error:
            _log.warning("the cluster's secret could not be kept: %s", error)

    def note_refused(self) -> None:
        """Another node has another secret: the one that is kept may be newer than this one.

        Another process of this user has taken it over; it holds from the next attempt on.
        """
        if self.files is None or self.secret is None:
            return
        try:
            kept = self.files.secret()
        except ShardmeshError as error:
            _log.debug("the kept secret is left aside: %s", error)
            return
        if kept is not None and kept.owner == self.secret.owner:
            self.secret = kept

    def take_update(self, signed: bytes, cluster: str) -> ClusterUpdate | None:
        """Takes a change of the secret over from now on; None if it is not news.

        Raises ProtocolError (theirs) for one that the owner did not sign, and for a public mesh.
        What cannot be written is said in the log: it holds until the node ends.
        """
        if self.secret is None:
            raise ProtocolError("a public mesh has no secret to change")
        update = open_update(signed, cluster=cluster, owner=self.secret.owner)
        if update.sequence <= self._known_sequence(cluster):
            return None
        self._last_sequence = update.sequence
        self.secret = update.new_secret()
        self.denied |= set(update.removed)
        if self.files is not None:
            try:
                self.files.keep_update(signed, self.secret)
            except ShardmeshError as error:
                _log.error("the cluster's new secret could not be kept: %s", error)
        return update

    def _known_sequence(self, cluster: str) -> int:
        """That of the last change, also over restarts: an old one must not come back."""
        kept = self.files.update() if self.files is not None else None
        if self._last_sequence < 0 and kept is not None and self.secret is not None:
            try:
                self._last_sequence = open_update(
                    kept, cluster=cluster, owner=self.secret.owner
                ).sequence
            except ProtocolError as error:
                _log.warning("the last change of the secret is left aside: %s", error)
        return self._last_sequence


PUBLIC: Final = Admission(None)
"""Everybody is let in."""


def private_mesh() -> RefusedError:
    """The other side wants a proof that this node has not to give."""
    return RefusedError(
        "the cluster is private: this node gave no secret", code="PRIVATE_MESH", next_step=SAY_HOW
    )


def public_mesh() -> RefusedError:
    """The other side does not know how to prove the secret."""
    return RefusedError(
        "the node there asks for no secret: its mesh is public, or it is no node of Shardmesh",
        code="PUBLIC_MESH",
        next_step="correct --bootstrap, or give --public if this mesh is meant",
    )


def wrong_secret() -> RefusedError:
    """The other side has another secret."""
    return RefusedError(
        "the cluster has another secret than this node",
        code="WRONG_SECRET",
        next_step=f"{SAY_HOW}; `shardmesh cluster secret` prints it where it is right",
    )


def not_admitted() -> RefusedError:
    """The secret is right, but a list excludes this node, or the other one."""
    return RefusedError(
        "the secret is right, but one of the two nodes does not admit the other",
        code="NOT_ADMITTED",
        next_step="look at --allow and --deny there and here, and whether the node was removed",
    )
