"""The model link: all that a person pastes on another machine to get a published model.

    shardmesh:NAME?m=<manifest digest>&k=<publisher's key>&b=<bootstrap>&b=<bootstrap>

Digest and key are hexadecimal, 64 digits each; the name is for people and decides nothing.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Final
from urllib.parse import parse_qsl, quote, unquote

from shardmesh.errors import InputError
from shardmesh.shards.manifest import check_model_name
from shardmesh.wire.limits import MODEL_LINK_BOOTSTRAPS_MAX, MODEL_LINK_CHARS_MAX

SCHEME: Final = "shardmesh:"
_HEX: Final = re.compile("[0-9a-f]{64}")
_ADDRESS: Final = re.compile(r"/[!-~]{1,255}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLink:
    """A published model, and where to ask for it."""

    model_name: str
    manifest_digest: str
    publisher: bytes
    bootstraps: tuple[str, ...] = ()

    def __str__(self) -> str:
        fields = [f"m={self.manifest_digest}", f"k={self.publisher.hex()}"]
        fields += [f"b={quote(address, safe='/:.')}" for address in self.bootstraps]
        return f"{SCHEME}{quote(self.model_name, safe='')}?{'&'.join(fields)}"


def parse_model_link(text: str) -> ModelLink:
    """The link in the text; raises InputError (theirs, BAD_LINK) with what is wrong."""
    text = text.strip()
    if len(text) > MODEL_LINK_CHARS_MAX:
        raise _bad(f"it is longer than {MODEL_LINK_CHARS_MAX} characters")
    if not text.startswith(SCHEME) or not text.isascii():
        raise _bad(f"it does not begin with {SCHEME}, or has odd characters")
    name, _, query = text.removeprefix(SCHEME).partition("?")
    try:
        pairs = parse_qsl(
            query,
            strict_parsing=True,
            keep_blank_values=True,
            errors="strict",
            max_num_fields=2 + MODEL_LINK_BOOTSTRAPS_MAX,
        )
        model_name = check_model_name(unquote(name, errors="strict"))
    except (ValueError, InputError) as error:
        raise _bad(str(error)[:200]) from error
    known = dict(pairs)
    bootstraps = tuple(value for key, value in pairs if key == "b")
    if known.keys() - {"m", "k", "b"} or len(pairs) != len(known.keys() - {"b"}) + len(bootstraps):
        raise _bad("it has parts that no link has, or has one twice")
    for key, what in (("m", "manifest digest"), ("k", "publisher's key")):
        if not _HEX.fullmatch(known.get(key, "")):
            raise _bad(f"it has no {what} of 64 hexadecimal digits")
    if not all(_ADDRESS.fullmatch(address) for address in bootstraps):
        raise _bad("a bootstrap in it is no address")
    return ModelLink(
        model_name=model_name,
        manifest_digest=known["m"],
        publisher=bytes.fromhex(known["k"]),
        bootstraps=bootstraps,
    )


def _bad(what: str) -> InputError:
    return InputError(
        f"this is no model link: {what}",
        code="BAD_LINK",
        next_step="copy the whole line that `shardmesh publish` printed, in quotes",
    )
