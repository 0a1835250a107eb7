"""The text of a cluster's secret: whole or refused, and never shown by accident."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import InputError
from shardmesh.wire.cluster_secret import ClusterSecret, new_secret, owner_of, parse_secret

OWNER_KEY = bytes(range(32))


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16))
def test_text_and_back(secret: bytes, owner: bytes) -> None:
    made = ClusterSecret(secret, owner)
    assert parse_secret(f" {made.text()}\n") == made
    assert made.text().startswith("sm1_")


def test_each_is_new_and_names_its_owner() -> None:
    one, other = new_secret(OWNER_KEY), new_secret(OWNER_KEY)
    assert one.secret != other.secret
    assert one.owner == other.owner == owner_of(OWNER_KEY)
    assert one.admission_key() != other.admission_key()
    assert one.admission_key() not in (one.secret, other.secret)


@given(st.integers(0, 73), st.sampled_from("abcXYZ019-_"))
def test_one_wrong_letter_is_noticed(position: int, letter: str) -> None:
    text = new_secret(OWNER_KEY).text()
    wrong = text[:position] + letter + text[position + 1 :]
    if wrong != text:
        with pytest.raises(InputError, match="is none, or not all of it"):
            parse_secret(wrong)


@pytest.mark.parametrize("text", ["", "sm1_", "hunter2", "sm1_!!!", "sm1_" + "A" * 70, "ä" * 74])
def test_what_is_no_secret_is_not_repeated(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_secret(text)
    assert caught.value.code == "BAD_SECRET"
    assert len(text) < 5 or text not in str(caught.value)


def test_repr_does_not_show_it() -> None:
    made = new_secret(OWNER_KEY)
    assert repr(made.secret) not in repr(made)
    assert made.text() not in repr(made)
