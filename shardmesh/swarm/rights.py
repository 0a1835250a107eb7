"""Which of those who were let in may send which command."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Final

from shardmesh.errors import InputError, RefusedError
from shardmesh.wire.commands import CHANGING_COMMANDS
from shardmesh.wire.peer_id import is_peer_id

MEMBERS: Final = "members"
NOBODY: Final = "nobody"


@dataclasses.dataclass(frozen=True)
class Whom:
    """A set of nodes: all that were admitted, or those named."""

    everybody: bool
    named: frozenset[str] = frozenset()

    def has(self, peer_id: str) -> bool:
        return self.everybody or peer_id in self.named


def whom(entries: Iterable[str], default: str = MEMBERS) -> Whom:
    """What `members`, `nobody` and peer ids mean together; the default if there is none.

    Raises InputError (theirs) for an entry that is neither.
    """
    given = frozenset(entries) or frozenset({default})
    named = given - {MEMBERS, NOBODY}
    if wrong := next((entry for entry in named if not is_peer_id(entry)), None):
        raise InputError(
            f"{wrong[:100]!r} is no peer id",
            next_step=f"give {MEMBERS}, {NOBODY}, or a whole peer id: `Peer ID: ...`",
        )
    if NOBODY in given and len(given) > 1:
        raise InputError(f"{NOBODY} and others contradict each other", code="CONTRADICTION")
    return Whom(MEMBERS in given, named)


@dataclasses.dataclass(frozen=True)
class Rights:
    """Who may send the commands that change a node, and who may have it write.

    Whoever was let in may read: capabilities, files, metrics.
    """

    changing: Whom = Whom(True)
    inference: Whom = Whom(True)

    def check(self, command: str, peer_id: str) -> None:
        """Raises RefusedError (theirs) if this node may not send this command."""
        if command in CHANGING_COMMANDS:
            allowed, flag = self.changing, "--allow-commands"
        elif command == "INFERENCE":
            allowed, flag = self.inference, "--allow-inference"
        else:
            return
        if not allowed.has(peer_id):
            raise RefusedError(
                f"this node does not take {command} from {peer_id}",
                code="NOT_ALLOWED",
                next_step=f"its owner may allow it with `{flag} {peer_id}`; a peer id that stays "
                "the same comes from --identity-file",
            )


EVERYBODY: Final = Rights()
