"""Tokens that a first stage has straight from the last one, ahead of the coordinator's word.  Pure.

The coordinator sends each token too, and what it sends counts.  So a token that does not come this
way, or is not taken, costs nothing but the time that it would have saved.
"""

from __future__ import annotations

from shardmesh.errors import ProtocolError
from shardmesh.wire.limits import HANDED_AHEAD_MAX
from shardmesh.wire.messages import TokenBatch


class HandedTokens:
    """Those of one session that the coordinator has not sent yet."""

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}  # by position

    def take(
        self, message: TokenBatch, *, n_received: int, branch: int, n_ctx: int, n_vocab: int
    ) -> bool:
        """Whether to compute a token that the last stage handed on.

        Not if another is there already, or begins a branch, or the coordinator is far behind, or
        if there is no such token.
        """
        is_next = message.position == n_received < n_ctx and message.branch == branch
        is_one = len(message.tokens) == 1 and not (message.check or message.embed or message.scored)
        is_token = message.tokens[0] < n_vocab
        if not (is_next and is_one and is_token) or len(self._tokens) >= HANDED_AHEAD_MAX:
            return False
        self._tokens[message.position] = message.tokens[0]
        return True

    def is_copy(self, message: TokenBatch, *, branch: int) -> bool:
        """Whether what the coordinator sends was handed on before.

        Also if it guesses another token: then the guess is wrong, as it will find by itself.
        Raises ProtocolError (theirs) for another token that is none of its guesses.
        """
        if message.branch > branch:
            return False
        token = self._tokens.pop(message.position, None)
        if token is None:
            return False
        if message.tokens != (token,) and not message.check:
            raise ProtocolError(
                "the last stage handed on another token than it told the coordinator",
                code="OTHER_TOKEN",
            )
        return True

    def forget_from(self, position: int) -> None:
        """What was handed on from there on is dropped."""
        self._tokens = {at: token for at, token in self._tokens.items() if at < position}
