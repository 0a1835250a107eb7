"""Every error that Shardmesh raises on purpose, divided by whose fault it is.

    ShardmeshError
    ├── OurError          a defect or a failure on this side
    │   ├── EngineError       llama.cpp refused or its process died
    │   └── StorageError      the disk is full, a file cannot be written
    ├── TheirError        the other side, or the person, gave something that cannot be used
    │   ├── InputError        a flag, a file, a prompt
    │   │   └── GgufError         a model file that is broken or cannot be cut
    │   ├── ProtocolError     bytes that break a rule of docs/protocol.md
    │   └── RefusedError      the other side understood and said no
    └── MomentError       nobody's fault; the same request may succeed later
        ├── BusyError         no room now
        ├── UnreachableError  no answer, or not in time
        └── IncompleteError   layers that nobody serves

Each carries a stable `code` for the wire, a sentence for a person and the next step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar, Final, Literal

Blame = Literal["ours", "theirs", "moment"]

_CODE: Final = re.compile("[A-Z][A-Z0-9_]{0,63}")


class ShardmeshError(Exception):
    """Base of all; `str()` is the sentence, `next_step` may be empty."""

    blame: ClassVar[Blame] = "ours"
    default_code: ClassVar[str] = "INTERNAL"
    default_next_step: ClassVar[str] = ""

    def __init__(self, sentence: str, *, code: str | None = None, next_step: str = "") -> None:
        super().__init__(sentence)
        self.code = code or self.default_code
        self.next_step = next_step or self.default_next_step


class OurError(ShardmeshError):
    """A defect or a failure on this side."""


class EngineError(OurError):
    """llama.cpp refused the work, or its process died."""

    default_code = "ENGINE_FAILED"


class StorageError(OurError):
    """The disk is full, or a file cannot be read or written."""

    default_code = "STORAGE_FAILED"
    default_next_step = "check the folder's permissions and the disk"


class TheirError(ShardmeshError):
    """Something was given that cannot be used as it is."""

    blame = "theirs"
    default_code = "BAD_REQUEST"


class InputError(TheirError):
    """A flag, a file or a prompt that cannot be used."""

    default_code = "BAD_INPUT"


class GgufError(InputError):
    """A model file that is broken or cannot be cut."""

    default_code = "BAD_GGUF"


class ProtocolError(TheirError):
    """Bytes that break a rule of the protocol; the connection they came on is closed."""

    default_code = "BAD_MESSAGE"


class RefusedError(TheirError):
    """The other side understood the request and refused it."""

    default_code = "REFUSED"


class MomentError(ShardmeshError):
    """Nobody's fault: the same request may succeed later."""

    blame = "moment"
    default_code = "TRY_AGAIN"


class BusyError(MomentError):
    """No room for one more now."""

    default_code = "BUSY"


class UnreachableError(MomentError):
    """No answer, or not in time."""

    default_code = "UNREACHABLE"


class IncompleteError(MomentError):
    """Layers that nobody in the mesh serves."""

    default_code = "INCOMPLETE_MESH"


_BY_BLAME: dict[Blame, type[ShardmeshError]] = {
    "ours": OurError,
    "theirs": TheirError,
    "moment": MomentError,
}
_BY_CODE: dict[str, type[ShardmeshError]] = {
    kind.default_code: kind
    for kind in (
        EngineError,
        StorageError,
        InputError,
        GgufError,
        ProtocolError,
        RefusedError,
        BusyError,
        UnreachableError,
        IncompleteError,
    )
}


def error_from_wire(code: str, blame: Blame, sentence: str, next_step: str = "") -> ShardmeshError:
    """The error that another node reported; an unknown code becomes the base of its blame.

    Its words are for terminals and logs, so what cannot be printed is left out.  What is no code
    becomes the one of its kind.
    """
    kind = _BY_CODE.get(code, _BY_BLAME[blame])
    known_code = code if _CODE.fullmatch(code) else None
    return kind(_printable(sentence), code=known_code, next_step=_printable(next_step))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def known_error(error: BaseException) -> ShardmeshError | None:
    """The first ShardmeshError in what a nursery raised, however deep its groups are."""
    if isinstance(error, BaseExceptionGroup):
        return next((known for e in error.exceptions if (known := known_error(e))), None)
    return error if isinstance(error, ShardmeshError) else None


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raises a ShardmeshError as itself that nurseries have wrapped in groups.

    A group with anything else than exceptions in it, a Ctrl-C or a cancellation, passes as it is.
    """
    try:
        yield
    except ExceptionGroup as group:
        known = known_error(group)
        if known is None:
            raise
        raise known from group


@contextmanager
def carried_past() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Carries what a block raises past the nurseries around it, which would put it into a group.

        with carried_past() as block:
            async with trio.open_nursery():
                with block():
                    yield something

    To the nurseries the block ends without an error.  Its own comes out behind them, in the place
    of whatever they raise: that of a cancellation would hide it.
    """
    failure: Exception | None = None

    @contextmanager
    def block() -> Iterator[None]:
        nonlocal failure
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised below
            failure = error

    try:
        yield block
    finally:
        if failure is not None:
            raise failure
