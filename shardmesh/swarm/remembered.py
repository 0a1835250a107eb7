"""Nodes that were reachable once, kept on disk: a way back into the mesh without a bootstrap."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import msgspec

from shardmesh.errors import ProtocolError
from shardmesh.swarm.state_file import write_state
from shardmesh.wire.codec import decode_json, encode_json
from shardmesh.wire.limits import (
    DIAL_ADDRESSES_MAX,
    REMEMBERED_FILE_BYTES_MAX,
    REMEMBERED_NODES_MAX,
)

_log = logging.getLogger(__name__)

Address = Annotated[str, msgspec.Meta(max_length=256)]


class RememberedNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A node and where it was last."""

    peer_id: Annotated[str, msgspec.Meta(max_length=128)]
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=DIAL_ADDRESSES_MAX)]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    nodes: Annotated[tuple[RememberedNode, ...], msgspec.Meta(max_length=REMEMBERED_NODES_MAX)]


class RememberedNodes:
    """At most 64 nodes, the most recently seen first."""

    def __init__(self, path: Path | None) -> None:
        """Reads the file; one that cannot be read is as good as none and is said in the log.

        Without a path nothing is kept.
        """
        self._path = path
        self._nodes = {node.peer_id: node for node in self._read()}
        self._saved: tuple[RememberedNode, ...] = ()

    def _read(self) -> tuple[RememberedNode, ...]:
        if self._path is None:
            return ()
        try:
            with self._path.open("rb") as file:
                data = file.read(REMEMBERED_FILE_BYTES_MAX + 1)
            return decode_json(data, _File).nodes
        except FileNotFoundError:
            return ()
        except (OSError, ProtocolError) as error:
            _log.warning("%s is left aside: %s", self._path, error)
            return ()

    def nodes(self) -> list[RememberedNode]:
        return list(self._nodes.values())

    def note(self, peer_id: str, addresses: tuple[str, ...]) -> None:
        """Puts a node that was just reached first; the one not seen for longest may go."""
        node = RememberedNode(peer_id=peer_id, addresses=addresses[:DIAL_ADDRESSES_MAX])
        if self._nodes.get(peer_id) == node and len(self._nodes) < REMEMBERED_NODES_MAX:
            return  # nothing has to be written, and nobody has to go
        others = [other for other in self._nodes.values() if other.peer_id != peer_id]
        kept = [node, *others][:REMEMBERED_NODES_MAX]
        self._nodes = {other.peer_id: other for other in kept}

    def save(self) -> None:
        """Writes the file, if anything changed; blocks on the disk.  StorageError (ours).

        What other processes of this user have remembered meanwhile stays, as far as there is room.
        """
        nodes = tuple(self._nodes.values())
        if self._path is None or nodes == self._saved:
            return
        others = [node for node in self._read() if node.peer_id not in self._nodes]
        kept = (*nodes, *others)[:REMEMBERED_NODES_MAX]
        write_state(self._path, encode_json(_File(nodes=kept)))
        self._saved = nodes
