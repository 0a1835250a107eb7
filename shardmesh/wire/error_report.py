"""An error as others are told of it: the fields that all messages have which report one."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from shardmesh.errors import Blame, ShardmeshError, error_from_wire
from shardmesh.wire.limits import TEXT_BYTES_MAX

Text = Annotated[str, msgspec.Meta(max_length=TEXT_BYTES_MAX)]

_CODE_LETTERS_MAX: Final = 64
_SENTENCE_LETTERS_MAX: Final = 1000  # four bytes each at most: TEXT_BYTES_MAX


class ErrorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of messages that report an error; made with `**told(error)`."""

    code: Text
    blame: Blame
    message: Text
    next_step: Text

    def error(self) -> ShardmeshError:
        """The error as one to raise here."""
        return error_from_wire(self.code, self.blame, self.message, self.next_step)


def told(error: ShardmeshError) -> dict[str, Any]:
    """An error as the fields of a ErrorReport; what is too long for a message is cut."""
    return {
        "code": error.code[:_CODE_LETTERS_MAX],
        "blame": error.blame,
        "message": str(error)[:_SENTENCE_LETTERS_MAX],
        "next_step": error.next_step[:_SENTENCE_LETTERS_MAX],
    }
