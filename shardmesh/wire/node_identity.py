"""What a node is called: for people, beside the peer id that proves who it is."""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

from shardmesh.errors import InputError
from shardmesh.wire.limits import NODE_TAGS_MAX

NAME_LETTERS_MAX: Final = 64
LOCATION_LETTERS_MAX: Final = 128
TAG_LETTERS_MAX: Final = 32
_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/=-]{0,31}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class NodeIdentity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Checked when it is made and when it comes from another node; empty where nothing is known."""

    uuid: Annotated[str, msgspec.Meta(max_length=36)] = ""
    name: Annotated[str, msgspec.Meta(max_length=NAME_LETTERS_MAX)] = ""
    location: Annotated[str, msgspec.Meta(max_length=LOCATION_LETTERS_MAX)] = ""
    tags: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=TAG_LETTERS_MAX)], ...],
        msgspec.Meta(max_length=NODE_TAGS_MAX),
    ] = ()

    def __post_init__(self) -> None:
        if self.uuid and not _UUID.fullmatch(self.uuid):
            raise ValueError("the UUID of a node is not one in lower case")
        for text in (self.name, self.location):
            if text != text.strip() or not text.isprintable():
                raise ValueError("a name or location has printable characters, no blanks around")
        if len(set(self.tags)) != len(self.tags) or not all(map(_TAG.fullmatch, self.tags)):
            raise ValueError("tags are different words of letters, digits and _.:/=-")


NO_IDENTITY: Final = NodeIdentity()
"""Of a node that says nothing about itself."""


def check_identity(uuid: str, name: str, location: str, tags: tuple[str, ...]) -> NodeIdentity:
    """An identity out of what a person gave; raises InputError (theirs) that says what is wrong."""
    lengths = (("name", name, NAME_LETTERS_MAX), ("location", location, LOCATION_LETTERS_MAX))
    for what, text, n_max in lengths:
        if len(text) > n_max:
            raise InputError(
                f"a node's {what} has at most {n_max} characters, not {len(text)}",
                code="BAD_NODE_IDENTITY",
                next_step="shorten it",
            )
    if len(tags) > NODE_TAGS_MAX:
        raise InputError(
            f"a node has at most {NODE_TAGS_MAX} tags, not {len(tags)}",
            code="BAD_NODE_IDENTITY",
            next_step="leave some out",
        )
    try:
        return NodeIdentity(uuid=uuid, name=name, location=location, tags=tags)
    except ValueError as error:
        raise InputError(
            str(error),
            code="BAD_NODE_IDENTITY",
            next_step="give another --name, --location or --tag",
        ) from error
