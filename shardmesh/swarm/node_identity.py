"""A node's UUID and name: given, kept over restarts, or made."""

from __future__ import annotations

import dataclasses
import json
import socket
import uuid
from pathlib import Path
from typing import Any, Final

from shardmesh.errors import InputError, StorageError
from shardmesh.swarm.state_file import write_state
from shardmesh.wire.node_identity import NAME_LETTERS_MAX, NodeIdentity, check_identity

FILE_NAME: Final = "node.json"
_FILE_BYTES_MAX: Final = 4096
_PEER_ID_LETTERS: Final = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """What a person wants a node to be called; `old_id` is that of an older program's node."""

    name: str = ""
    location: str = ""
    tags: tuple[str, ...] = ()
    old_id: str = ""


def load_node_identity(folder: Path, peer_id: str, wanted: Naming) -> NodeIdentity:
    """The identity of the node whose state lies in `folder`.

    Its UUID is made at the first start, of an old id if one is given, and kept.  Without a name it
    is called after the machine and the end of its peer id.  Raises InputError (theirs) for a name,
    location or tag that cannot be, and for a file that is no identity.
    """
    path = folder / FILE_NAME
    kept = _read(path)
    own_uuid = str(kept.get("uuid") or _uuid_of(wanted.old_id))
    old_name = "" if kept or _is_uuid(wanted.old_id) else wanted.old_id
    named = wanted.name or old_name or str(kept.get("name") or "")
    identity = check_identity(
        own_uuid, named or _default_name(peer_id), wanted.location, wanted.tags
    )
    known = {"uuid": identity.uuid, "name": named}
    if known != kept:
        write_state(path, json.dumps(known).encode())
    return identity


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_FILE_BYTES_MAX))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:
        value = None
    if not isinstance(value, dict) or not _is_uuid(str(value.get("uuid"))):
        raise InputError(
            f"{path} does not hold a node's identity",
            code="BAD_NODE_IDENTITY",
            next_step="remove it; the node gets a new UUID",
        )
    return value


def _uuid_of(old_id: str) -> str:
    """A new one; or the old id itself, or always the same one made of it."""
    if not old_id:
        return str(uuid.uuid4())
    if _is_uuid(old_id):
        return str(uuid.UUID(old_id))
    return str(uuid.uuid5(uuid.NAMESPACE_OID, old_id))


def _is_uuid(text: str) -> bool:
    try:
        uuid.UUID(text)
    except ValueError:
        return False
    return True


def _default_name(peer_id: str) -> str:
    """The machine's name, and what tells its nodes apart."""
    host = "".join(letter for letter in socket.gethostname() if letter.isprintable()).strip()
    end = peer_id[-_PEER_ID_LETTERS:]
    return f"{host[: NAME_LETTERS_MAX - len(end) - 1] or 'node'}-{end}"
