"""Pieces of prompts and their names: who shares, and who never does."""

from __future__ import annotations

import dataclasses

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st
from support.manifests import a_manifest

from shardmesh.coordinator.pieces import pieces_of, whole_borders
from shardmesh.coordinator.prefixes import PromptPrefix, asker_key, prefix_of
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.listener.kept_sequences import n_common
from shardmesh.shards.piece_tokens import legal_numbers
from shardmesh.wire.limits import PIECE_TOKENS_MIN, PREFIX_PIECES_MAX

KEY = bytes(32)
STAGE = ("stage",)
prompts = st.lists(st.integers(0, 3), max_size=130).map(tuple)
lengths = st.sampled_from(legal_numbers())


@given(prompts, lengths, st.integers(0, 200))
def test_pieces_are_the_prompt_and_end_where_the_positions_say(
    prompt: tuple[int, ...], piece_tokens: int, start: int
) -> None:
    pieces = list(pieces_of(prompt, piece_tokens, start))
    assert [token for piece in pieces for token in piece] == list(prompt[start:])
    assert all(1 <= len(piece) <= piece_tokens for piece in pieces)
    borders = set(whole_borders(10_000, piece_tokens))
    position = start
    for piece in pieces:
        assert position in {0, start} | borders
        position += len(piece)
        assert position in borders or position == len(prompt)


@given(prompts, prompts, lengths)
def test_the_borders_of_a_common_beginning_are_the_same(
    one: tuple[int, ...], other: tuple[int, ...], piece_tokens: int
) -> None:
    n_tokens = min(len(one), len(other))
    borders = [b for b in whole_borders(len(one), piece_tokens) if b <= n_tokens]
    assert borders == list(whole_borders(n_tokens, piece_tokens))


@given(prompts, lengths, st.integers(0, 8))
def test_who_begins_behind_whole_pieces_goes_on_with_the_same_ones(
    prompt: tuple[int, ...], piece_tokens: int, n_pieces: int
) -> None:
    whole = list(pieces_of(prompt, piece_tokens))
    assert list(pieces_of(prompt, piece_tokens, n_pieces * piece_tokens)) == whole[n_pieces:]


@given(prompts, lengths, lengths)
def test_names_of_pieces_of_another_length_are_never_equal(
    prompt: tuple[int, ...], one: int, other: int
) -> None:
    assume(one != other)
    prefix = PromptPrefix(prompt, KEY)
    names = {name.digest for name in prefix.pieces_for(STAGE, one)}
    assert not names & {name.digest for name in prefix.pieces_for(STAGE, other)}


@given(prompts, prompts, lengths, st.integers(0, 130))
def test_equal_names_are_equal_beginnings(
    one: tuple[int, ...], other: tuple[int, ...], piece_tokens: int, n_equal: int
) -> None:
    other = one[:n_equal] + other[n_equal:]
    names, others = (
        PromptPrefix(prompt, KEY).pieces_for(STAGE, piece_tokens) for prompt in (one, other)
    )
    for name, another in zip(names, others, strict=False):
        assert name.end == another.end
        assert (name.digest == another.digest) == (one[: name.end] == other[: name.end])


@given(prompts, lengths)
def test_names_are_of_whole_pieces_and_depend_on_key_and_stage(
    prompt: tuple[int, ...], piece_tokens: int
) -> None:
    prefix = PromptPrefix(prompt, KEY)
    names = prefix.pieces_for(STAGE, piece_tokens)
    assert [name.end for name in names] == list(whole_borders(len(prompt), piece_tokens))
    for strange in (
        prefix.pieces_for(("another stage",), piece_tokens),
        prefix.pieces_for(("stage before", *STAGE), piece_tokens),
        PromptPrefix(prompt, bytes(31) + b"1").pieces_for(STAGE, piece_tokens),
    ):
        assert n_common(names, strange) == 0
    assert not {name.digest for name in names} & {
        name.digest for name in prefix.pieces_for(("another stage",), piece_tokens)
    }


def test_every_asker_has_a_key_of_its_own() -> None:
    base = {"tenant": "alice", "manifest_digest": "d", "adapter": ""}
    keys = {
        asker_key(KEY, **base),
        asker_key(KEY, **{**base, "tenant": "bob"}),
        asker_key(KEY, **{**base, "tenant": "alic", "manifest_digest": "ed"}),
        asker_key(KEY, **{**base, "manifest_digest": "e"}),
        asker_key(KEY, **{**base, "adapter": "a"}),
        asker_key(KEY, **base, wire="f16"),
        asker_key(bytes(31) + b"1", **base),
    }
    assert len(keys) == 7
    assert asker_key(KEY, **base) in keys


@given(prompts, lengths, st.integers(0, 10_000))
def test_what_is_reused_is_whole_pieces_and_leaves_a_token(
    prompt: tuple[int, ...], piece_tokens: int, n_held: int
) -> None:
    n_reusable = PromptPrefix(prompt, KEY).n_reusable(n_held, piece_tokens)
    assert n_reusable in {0, *whole_borders(len(prompt), piece_tokens)}
    assert n_reusable <= n_held
    assert n_reusable < max(1, len(prompt))


def test_a_very_long_prompt_is_named_as_far_as_a_message_allows() -> None:
    prompt = tuple(range(10)) * (PREFIX_PIECES_MAX * PIECE_TOKENS_MIN // 10 + 100)
    names = PromptPrefix(prompt, KEY).pieces_for(STAGE, PIECE_TOKENS_MIN)
    assert len(names) == PREFIX_PIECES_MAX


def test_what_decides_whether_a_prompt_may_be_reused() -> None:
    manifest = a_manifest()
    request = CompletionRequest(prompt="x", tenant="alice")
    prefix = prefix_of([1, 2], request, manifest, KEY)
    assert prefix is not None
    bobs = prefix_of([1, 2], dataclasses.replace(request, tenant="bob"), manifest, KEY)
    assert bobs is not None
    assert bobs.key != prefix.key
    assert prefix_of([1], dataclasses.replace(request, reuse_prefix=False), manifest, KEY) is None
    recurrent = msgspec.structs.replace(manifest, can_roll_back=False)
    assert prefix_of([1], request, recurrent, KEY) is None


def test_neither_prompt_nor_key_is_printed() -> None:
    assert "1234" not in repr(PromptPrefix((1234,), b"1234"))
