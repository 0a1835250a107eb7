"""What a first stage takes of the tokens that the last one hands on."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.link_messages import token_batch

from shardmesh.errors import ProtocolError
from shardmesh.listener.handed import HandedTokens
from shardmesh.wire.limits import HANDED_AHEAD_MAX
from shardmesh.wire.messages import TokenBatch

N_CTX = 40
N_VOCAB = 64
NEXT = 10
TOKEN = token_batch(position=NEXT, tokens=(5,), branch=3, hand=True)


def take(handed: HandedTokens, message: TokenBatch, n_received: int = NEXT) -> bool:
    return handed.take(message, n_received=n_received, branch=3, n_ctx=N_CTX, n_vocab=N_VOCAB)


def changed(**fields: object) -> TokenBatch:
    return msgspec.structs.replace(TOKEN, **fields)


def test_the_next_token_is_taken() -> None:
    assert take(HandedTokens(), TOKEN)


@pytest.mark.parametrize(
    "message",
    [
        changed(position=NEXT - 1),
        changed(position=NEXT + 1),
        changed(branch=2),
        changed(branch=4),
        changed(tokens=(5, 6)),
        changed(check=bytes(8)),
        changed(embed=True),
        changed(tokens=(N_VOCAB,)),
    ],
    ids=["late", "early", "old branch", "new branch", "two tokens", "a guess", "to embed", "none"],
)
def test_what_is_not_just_the_next_token_is_left_out(message: TokenBatch) -> None:
    assert not take(HandedTokens(), message)


def test_nothing_is_taken_beyond_the_context() -> None:
    assert take(HandedTokens(), changed(position=N_CTX - 1), N_CTX - 1)
    assert not take(HandedTokens(), changed(position=N_CTX), N_CTX)


def test_the_coordinators_copy_is_not_computed_again() -> None:
    handed = HandedTokens()
    take(handed, TOKEN)
    assert handed.is_copy(TOKEN, branch=3)
    assert not handed.is_copy(TOKEN, branch=3), "only once"
    assert not handed.is_copy(changed(position=NEXT + 1), branch=3)


def test_a_newer_branch_is_no_copy() -> None:
    handed = HandedTokens()
    take(handed, TOKEN)
    assert not handed.is_copy(changed(branch=4), branch=3)


def test_a_guess_of_another_token_is_left_out_and_anything_else_is_refused() -> None:
    handed = HandedTokens()
    take(handed, TOKEN)
    assert handed.is_copy(changed(tokens=(6,), check=bytes(8)), branch=3)
    take(handed, TOKEN)
    with pytest.raises(ProtocolError, match="another token") as caught:
        handed.is_copy(changed(tokens=(6,)), branch=3)
    assert caught.value.code == "OTHER_TOKEN"


@given(steps=st.lists(st.sampled_from(["handed", "sent", "dropped"]), max_size=120))
def test_so_many_are_ahead_of_the_coordinator_at_most_and_no_more(steps: list[str]) -> None:
    handed, n_received, n_sent = HandedTokens(), 0, 0
    for step in steps:
        if step == "handed":
            is_taken = handed.take(
                changed(position=n_received),
                n_received=n_received,
                branch=3,
                n_ctx=1000,
                n_vocab=N_VOCAB,
            )
            assert is_taken == (n_received - n_sent < HANDED_AHEAD_MAX)
            n_received += is_taken
        elif step == "sent":
            assert handed.is_copy(changed(position=n_sent), branch=3) == (n_sent < n_received)
            n_sent += 1
            n_received = max(n_received, n_sent)
        else:
            handed.forget_from(n_sent)
            n_received = n_sent
