"""API tokens by name, and how often each may ask."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

from shardmesh.errors import InputError
from shardmesh.web.errors import RateLimitError
from shardmesh.wire.limits import API_TOKENS_MAX, RATE_CALLERS_MAX

TOKEN_LETTERS_MIN = 16
_LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9_.@-]{1,64}):)?(?P<token>[\x21-\x7e]{1,512})")
_FILE_BYTES_MAX = API_TOKENS_MAX * 600


class ApiTokens:
    """The tokens that are known; with none, nobody needs one."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        """Each line is `TOKEN` or `NAME:TOKEN`; raises InputError (theirs) for any other."""
        self._names: list[tuple[bytes, str]] = []
        for line in lines:
            match = _LINE.fullmatch(line)
            if match is None or len(match["token"]) < TOKEN_LETTERS_MIN:
                raise InputError(
                    f"an API token has at least {TOKEN_LETTERS_MIN} printable letters, and may "
                    "have a name and a colon before it",
                    code="BAD_API_TOKEN",
                    next_step="make one with `openssl rand -hex 32`",
                )
            name = match["name"] or f"token {len(self._names) + 1}"
            self._names.append((_digest(match["token"]), name))
        if len(self._names) > API_TOKENS_MAX:
            raise InputError(f"more than {API_TOKENS_MAX} API tokens", code="BAD_API_TOKEN")

    def __bool__(self) -> bool:
        return bool(self._names)

    def name_of(self, token: str) -> str | None:
        """Whose token it is; None for an unknown one, "anybody" if there are no tokens.

        Looks at all of them, in a time that does not depend on which letters are right.
        """
        if not self._names:
            return "anybody"
        given, found = _digest(token), None
        for digest, name in self._names:
            if hmac.compare_digest(digest, given):
                found = name
        return found


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
        raise InputError(f"{path} cannot be read: {error}", code="BAD_API_TOKEN") from error
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
