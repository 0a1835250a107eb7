"""API tokens by name, what each may do, and how often it may ask."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from shardmesh.errors import InputError
from shardmesh.web.errors import RateLimitError
from shardmesh.wire.limits import API_TOKENS_MAX, RATE_CALLERS_MAX

TOKEN_LETTERS_MIN = 16
RIGHTS: Final = frozenset({"inference", "read", "operate"})
"""To have something computed; to see nodes, mesh and figures; to load and unload shards."""

_LINE = re.compile(
    r"(?:(?P<name>[A-Za-z0-9_.@-]{1,64})(?:/(?P<rights>[a-z,]{1,64}))?:)?"
    r"(?P<token>[\x21-\x39\x3b-\x7e]{1,512})"  # no colon: a mistyped name is no part of a token
)
_FILE_BYTES_MAX = API_TOKENS_MAX * 600


class Caller(NamedTuple):
    """Who asks, by the name of the token."""

    name: str
    rights: frozenset[str]


ANYBODY: Final = Caller("anybody", RIGHTS)
"""Where no token is needed."""


class ApiTokens:
    """The tokens that are known; with none, nobody needs one."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        """Each line is `TOKEN`, `NAME:TOKEN` or `NAME/RIGHT,RIGHT:TOKEN`.

        A token without rights has all.  Raises InputError (theirs) for any other line.
        """
        self._callers: list[tuple[bytes, Caller]] = []
        for line in lines:
            match = _LINE.fullmatch(line)
            if match is None or len(match["token"]) < TOKEN_LETTERS_MIN:
                raise InputError(
                    f"an API token has at least {TOKEN_LETTERS_MIN} printable letters without a "
                    "colon, and may have a name, rights and a colon before it",
                    code="BAD_API_TOKEN",
                    next_step="make one with `openssl rand -hex 32`",
                )
            name = match["name"] or f"token {len(self._callers) + 1}"
            caller = Caller(name, _rights(match["rights"]))
            self._callers.append((_digest(match["token"]), caller))
        if len(self._callers) > API_TOKENS_MAX:
            raise InputError(f"more than {API_TOKENS_MAX} API tokens", code="BAD_API_TOKEN")

    def __bool__(self) -> bool:
        return bool(self._callers)

    def caller(self, token: str) -> Caller | None:
        """Whose token it is; None for an unknown one, ANYBODY if there are no tokens.

        Looks at all of them, in a time that does not depend on which letters are right.
        """
        if not self._callers:
            return ANYBODY
        given, found = _digest(token), None
        for digest, caller in self._callers:
            if hmac.compare_digest(digest, given):
                found = caller
        return found


def _rights(text: str | None) -> frozenset[str]:
    """Rights divided by commas; all of them if nothing is said."""
    if text is None:
        return RIGHTS
    rights = frozenset(text.split(","))
    if not rights <= RIGHTS:
        raise InputError(
            f"an API token cannot have the rights {text}",
            code="BAD_API_TOKEN",
            next_step=f"choose from {', '.join(sorted(RIGHTS))}",
        )
    return rights


def read_tokens(path: Path) -> list[str]:
    """The lines of a file of tokens, without empty ones and comments.

    Raises InputError (theirs) for one that cannot be read, or that others can.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise InputError(
                f"{path} can be read by others",
                code="BAD_API_TOKEN",
                next_step=f"run `chmod 600 {path}`",
            )
        with path.open("rb") as file:
            text = file.read(_FILE_BYTES_MAX).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(
            f"{path} cannot be read: {reason}",
            code="BAD_API_TOKEN",
            next_step="give --api-token-file a file with one token in each line",
        ) from error
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class RateLimits:
    """A bucket of requests for each caller, which fills by so many a minute."""

    def __init__(self, rate_per_minute: int) -> None:
        self._rate_per_minute = rate_per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, at what time

    def take(self, caller: str, now_s: float) -> None:
        """Counts one request; raises RateLimitError (the moment's) if there is none left."""
        if not self._rate_per_minute:
            return
        per_s = self._rate_per_minute / 60
        left, then_s = self._buckets.pop(caller, (float(self._rate_per_minute), now_s))
        left = min(float(self._rate_per_minute), left + (now_s - then_s) * per_s)
        is_empty = left < 1
        self._buckets[caller] = (left if is_empty else left - 1, now_s)
        if len(self._buckets) > RATE_CALLERS_MAX:
            del self._buckets[next(iter(self._buckets))]  # who has not asked for the longest time
        if is_empty:
            raise RateLimitError((1 - left) / per_s)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
