"""Who is let in: nodes that prove the cluster's secret and that no list excludes.

The decision alone; `swarm/noise.py` makes the handshake that carries it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

from shardmesh.errors import InputError, RefusedError, ShardmeshError
from shardmesh.wire.cluster_secret import ClusterSecret
from shardmesh.wire.peer_id import is_peer_id

_log = logging.getLogger(__name__)

SAY_HOW: Final = (
    "give --secret or --secret-file, as in the line that `shardmesh bootstrap` printed, "
    "or LLAMA_SECRET"
)


class Admission:
    """What a node asks of others before it speaks with them.

    Without a secret the mesh is public: whoever is not denied gets in.  `keep` is called once,
    when another node has proven that the secret is right.
    """

    def __init__(
        self,
        secret: ClusterSecret | None,
        *,
        allowed: Iterable[str] = (),
        denied: Iterable[str] = (),
        keep: Callable[[ClusterSecret], None] | None = None,
    ) -> None:
        """Raises InputError (theirs) for an entry of the lists that is no peer id."""
        self.secret = secret
        self.allowed = frozenset(allowed)
        self.denied = frozenset(denied)
        self._keep = keep
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
        keep, self._keep = self._keep, None
        if keep is not None and self.secret is not None:
            try:
                keep(self.secret)
            except ShardmeshError as error:
                _log.warning("the cluster's secret could not be kept: %s", error)


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
