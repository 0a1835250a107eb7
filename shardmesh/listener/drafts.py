"""Which micro-batches the last stage computes when some of them are guesses.  Pure.

The last stage knows each token before the coordinator does: it sampled it.  So it computes a draft
only if it is that token, and its sampler chooses exactly where it would without drafts.
"""

from __future__ import annotations

from shardmesh.wire.draft_check import draft_check
from shardmesh.wire.limits import DRAFTS_MAX, HANDED_AHEAD_MAX

_TOKENS_KEPT = 2 * DRAFTS_MAX + HANDED_AHEAD_MAX
"""A draft may come again after a repair, this far behind what was sampled at most."""


class DraftChecks:
    """The tokens that were sampled of late in one session, and the branch that went astray."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._tokens: dict[int, int] = {}  # by position
        self._astray = -1

    def is_due(self, position: int, branch: int, check: bytes, *, n_computed: int) -> bool:
        """Whether to compute what begins at `position`; asked in the order of arrival.

        Behind a wrong draft nothing of its branch counts.  What was computed and comes again,
        because the coordinator had not heard of it before a repair, is not computed twice.
        """
        if branch <= self._astray:
            return False
        if check and not self._fits(position, check):
            self._astray = branch
            return False
        return position >= n_computed

    def sampled(self, position: int, token: int) -> None:
        """The token for `position` is known."""
        self._tokens[position] = token
        while len(self._tokens) > _TOKENS_KEPT:
            del self._tokens[next(iter(self._tokens))]

    def _fits(self, position: int, check: bytes) -> bool:
        token = self._tokens.get(position)
        return token is not None and check == draft_check(self._key, position, token)
