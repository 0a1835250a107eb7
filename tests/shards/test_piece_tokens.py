"""How long the pieces of a model's prompts are: what suits, and what may be wished for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.models import BUILT_IN, write_model

from shardmesh.coordinator.embed import EMBEDDING_TOKENS
from shardmesh.coordinator.session import N_BATCHES_IN_FLIGHT_MAX
from shardmesh.engine.llama import N_BATCH_TOKENS_MAX
from shardmesh.errors import InputError
from shardmesh.shards.architectures import rules_for
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.layers import ranges_of_counts
from shardmesh.shards.piece_tokens import (
    AUTO,
    auto_piece_tokens,
    choose_piece_tokens,
    is_legal,
    legal_numbers,
    parse_piece_tokens,
)
from shardmesh.shards.row_width import row_bytes_of
from shardmesh.shards.split import split_model
from shardmesh.wire.limits import (
    FRAME_BODY_BYTES_MAX,
    LINK_QUEUE_BYTES_MAX,
    MICRO_BATCH_TOKENS_MAX,
    MODEL_LAYERS_MAX,
    PIECE_BYTES_MAX,
    PIECE_TOKENS_MAX,
    PIECE_TOKENS_MIN,
)

ROW_BYTES = 4 * 1024


def test_what_suits_follows_from_the_number_of_shards() -> None:
    assert [auto_piece_tokens(n) for n in (1, 2, 3, 4, 8, MODEL_LAYERS_MAX)] == [64, 64, *[32] * 4]
    assert all(is_legal(auto_piece_tokens(n)) for n in range(1, MODEL_LAYERS_MAX + 1))


def test_legal_are_powers_of_two_between_the_limits() -> None:
    assert legal_numbers() == [16, 32, 64, 128, 256, 512]
    assert not is_legal(PIECE_TOKENS_MIN - 1)
    assert not is_legal(PIECE_TOKENS_MAX + 1)
    assert not is_legal(2 * PIECE_TOKENS_MAX)
    assert not is_legal(0)


def test_engines_and_messages_take_the_longest() -> None:
    assert PIECE_TOKENS_MAX <= N_BATCH_TOKENS_MAX
    assert PIECE_TOKENS_MAX <= MICRO_BATCH_TOKENS_MAX
    assert EMBEDDING_TOKENS <= N_BATCH_TOKENS_MAX
    assert PIECE_BYTES_MAX <= FRAME_BODY_BYTES_MAX
    assert N_BATCHES_IN_FLIGHT_MAX * PIECE_BYTES_MAX <= LINK_QUEUE_BYTES_MAX


@pytest.mark.parametrize("number", legal_numbers())
def test_an_option_names_a_number_or_none(number: int) -> None:
    assert parse_piece_tokens(str(number)) == number
    assert parse_piece_tokens("auto") is AUTO


@pytest.mark.parametrize("text", ["", "0", "8", "48", "1024", "-32", "32.0", "٣٢", "x", "9" * 5000])
def test_another_option_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="power of two from 16 to 512") as caught:
        parse_piece_tokens(text)
    assert caught.value.next_step


@given(st.integers(1, MODEL_LAYERS_MAX), st.integers(1, PIECE_BYTES_MAX // PIECE_TOKENS_MIN))
def test_what_is_chosen_has_room(n_shards: int, row_bytes: int) -> None:
    chosen = choose_piece_tokens(AUTO, n_shards=n_shards, row_bytes=row_bytes)
    assert is_legal(chosen)
    assert chosen * row_bytes <= PIECE_BYTES_MAX
    assert chosen == auto_piece_tokens(n_shards) or 2 * chosen * row_bytes > PIECE_BYTES_MAX


def test_too_many_hidden_states_are_refused_with_the_most_that_have_room() -> None:
    widest = PIECE_BYTES_MAX // 128
    assert choose_piece_tokens(128, n_shards=2, row_bytes=widest) == 128
    with pytest.raises(InputError, match="have 64 tokens at most") as caught:
        choose_piece_tokens(128, n_shards=2, row_bytes=widest + 1)
    assert caught.value.code == "TOO_WIDE"
    assert "--piece-tokens 64" in caught.value.next_step
    with pytest.raises(InputError, match="too many to send 16") as caught:
        choose_piece_tokens(AUTO, n_shards=2, row_bytes=PIECE_BYTES_MAX // PIECE_TOKENS_MIN + 1)
    assert caught.value.code == "TOO_WIDE"


def test_the_widest_known_models_can_have_long_pieces() -> None:
    assert choose_piece_tokens(512, n_shards=2, row_bytes=4 * 8192) == 512
    assert choose_piece_tokens(256, n_shards=2, row_bytes=4 * 16_384) == 256
    assert choose_piece_tokens(128, n_shards=2, row_bytes=4 * 4 * 7168) == 128


def test_an_illegal_number_is_not_taken_by_the_library_either(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", n_layer=2, vocabulary=BUILT_IN)
    with pytest.raises(InputError, match="48"):
        split_model(model, ranges_of_counts([1, 1]), tmp_path / "out", name="m", piece_tokens=48)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("counts", "wanted", "expected"),
    [((2, 1), AUTO, 64), ((1, 1, 1), AUTO, 32), ((1, 1, 1), 256, 256), ((3,), 16, 16)],
)
def test_a_split_model_says_it(
    tmp_path: Path, counts: tuple[int, ...], wanted: int | None, expected: int
) -> None:
    model = write_model(tmp_path / "m.gguf", n_layer=3, vocabulary=BUILT_IN)
    ranges = ranges_of_counts(counts)
    manifest = split_model(model, ranges, tmp_path / "out", name="m", piece_tokens=wanted)
    assert manifest.piece_tokens == expected


def test_a_row_has_all_streams_of_a_token(tmp_path: Path) -> None:
    plain = read_gguf(write_model(tmp_path / "m.gguf", n_layer=2, vocabulary=BUILT_IN))
    n_embd = plain.get_int("llama.embedding_length")
    assert row_bytes_of(plain, rules_for(plain)) == 4 * n_embd
