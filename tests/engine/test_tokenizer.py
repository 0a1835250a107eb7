"""Tokens to text and back, as llama-cpp-python's own tokenizer does it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import pytest
from support.models import BUILT_IN
from support.vocabularies import write_vocabulary

from shardmesh.engine.text import TextDecoder
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import GgufError, InputError
from shardmesh.wire.limits import PROMPT_BYTES_MAX

VOCABULARIES = ("llama-spm", "llama-bpe", "phi-3", "qwen2", "gpt-2", BUILT_IN)
TEXTS = [
    "",
    "Once upon a time there was a king.",
    "  two spaces, a\ttab\n\nand lines\r\n",
    "Grüße, 東京, Привет, 👩‍👩‍👧 and 🇪🇺!",
    "1234567890 == 3.14159e-10 && x[i] += y;",
    "nothing\x00after a zero",
]


@pytest.fixture(scope="module", params=VOCABULARIES)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    return write_vocabulary(folder / "vocabulary.gguf", request.param, "{{ messages }}")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Iterator[Tokenizer]:
    with Tokenizer.open(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(path: Path) -> Iterator[llama_cpp.Llama]:
    llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    yield llama
    llama.close()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special", [False, True])
def test_tokens_are_those_of_llama_cpp(
    tokenizer: Tokenizer, reference: llama_cpp.Llama, text: str, add_special: bool
) -> None:
    tokens = tokenizer.encode(text, add_special=add_special)
    assert tokens == reference.tokenize(text.encode(), add_bos=add_special, special=False)
    assert tokenizer.n_vocab == reference.n_vocab()


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text, add_special=False)
    assert tokenizer.decode(tokens).decode() == text
    decoder = TextDecoder()
    pieces = "".join(decoder.feed(tokenizer.piece(token)) for token in tokens) + decoder.finish()
    assert pieces in (text, " " + text)


def test_control_tokens_in_text_stay_text_unless_asked(tokenizer: Tokenizer) -> None:
    end = tokenizer.eos_text
    assert end in tokenizer.control_texts
    (token,) = tokenizer.encode(end, add_special=False, parse_special=True)[-1:]
    assert tokenizer.is_end(token)
    assert tokenizer.piece(token) == b""
    assert tokenizer.piece(token, show_special=True).decode() == end
    tokens = tokenizer.encode(f"a{end}b", add_special=False)
    assert not any(tokenizer.is_end(token) for token in tokens)
    assert len(tokens) > 3


def test_ordinary_tokens_do_not_end_the_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the end", add_special=False)
    assert not any(tokenizer.is_end(token) for token in tokens)


def test_the_template_is_that_of_the_file(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat_template == "{{ messages }}"


def test_long_pieces_fit(tokenizer: Tokenizer) -> None:
    text = " " * 3000 + "x" * 3000
    tokens = tokenizer.encode(text, add_special=False)
    assert tokenizer.decode(tokens).decode().strip() == "x" * 3000


@pytest.mark.parametrize("token", [-1, 2**31 - 1])
def test_tokens_that_do_not_exist_are_refused(tokenizer: Tokenizer, token: int) -> None:
    for method in (tokenizer.piece, tokenizer.is_end, lambda t: tokenizer.decode([1, t])):
        with pytest.raises(InputError, match="not in the vocabulary"):
            method(token)


def test_texts_that_cannot_be_used_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(InputError) as caught:
        tokenizer.encode("x" * (PROMPT_BYTES_MAX + 1))
    assert caught.value.code == "PROMPT_TOO_LONG"


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(GgufError):
        Tokenizer.open(broken)
