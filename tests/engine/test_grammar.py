from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.chains import opened

from shardmesh.demo_model import DEMO_MODEL
from shardmesh.engine.base import EngineOptions, MicroBatch, Output, SamplingSettings
from shardmesh.engine.grammar import check_grammar, grammar_of_json_schema
from shardmesh.engine.llama import LlamaEngine, load_engine
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import InputError
from shardmesh.wire.limits import GRAMMAR_BYTES_MAX

pytestmark = pytest.mark.skipif(not DEMO_MODEL.exists(), reason="the demo model is not here")

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [7, 70]}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def write(grammar: str, *, vocabulary: Path = DEMO_MODEL, temperature: float = 0.8) -> str:
    """What the demo model writes under a grammar, to its end."""
    options = EngineOptions(n_ctx=256, n_parallel=1, n_threads=1, vocabulary_path=str(vocabulary))
    sampling = SamplingSettings(temperature=temperature, seed=4, grammar=grammar)
    with opened(DEMO_MODEL, options) as engine, Tokenizer.open(DEMO_MODEL) as tokenizer:
        engine.open_sequence(0, sampling)
        tokens, text = tuple(tokenizer.encode("Once upon a time")), b""
        for _ in range(100):
            batch = MicroBatch(sequence=0, position=engine.n_held(0), tokens=tokens, sample=True)
            sampled = engine.compute([batch])[0].sampled
            assert sampled is not None
            if tokenizer.is_end(sampled.token):
                return text.decode()
            text += tokenizer.piece(sampled.token)
            tokens = (sampled.token,)
    raise AssertionError(f"no end: {text!r}")


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_text_follows_a_json_schema(temperature: float) -> None:
    answer = json.loads(write(grammar_of_json_schema(SCHEMA), temperature=temperature))
    assert set(answer) == {"name", "age"}
    assert answer["age"] in (7, 70)


def test_the_text_follows_a_grammar() -> None:
    assert write('root ::= ("yes" | "no") "!"') in ("yes!", "no!")


def sample(engine: LlamaEngine, sequences: Sequence[int], position: int) -> list[Output]:
    """One step of these sequences, in one computation."""
    return engine.compute(
        [MicroBatch(sequence=i, position=position, tokens=(1,), sample=True) for i in sequences]
    )


def test_a_grammar_that_leaves_nothing_ends_its_own_sequence_only() -> None:
    """What was computed together with it goes on, and comes out as it would have alone."""
    options = EngineOptions(n_ctx=256, n_parallel=2, n_threads=1, vocabulary_path=str(DEMO_MODEL))
    settings = SamplingSettings(temperature=1.0, seed=4)
    dead_end = dataclasses.replace(settings, grammar=r'root ::= "a" [^\x00-\U7FFFFFFF]')
    engine = load_engine(DEMO_MODEL, options)
    try:
        engine.join_sequences([2])
        engine.open_sequence(1, settings)
        expected = [sample(engine, [1], position)[0].sampled for position in range(3)]
        engine.open_sequence(0, dead_end)
        engine.open_sequence(1, settings)
        steps = [sample(engine, sequences, n) for n, sequences in enumerate([[0, 1], [0, 1], [1]])]
        assert [outputs[-1].sampled for outputs in steps] == expected
        failure = steps[1][0].failure
        assert failure is not None
        assert failure.code == "BAD_GRAMMAR"
        with pytest.raises(InputError, match="failed before"):
            sample(engine, [0], 2)
    finally:
        engine.close()


@pytest.mark.parametrize("grammar", ["nix ::= root", 'root ::= root "a"', 'root ::= "'])
def test_what_is_no_grammar_is_refused(grammar: str) -> None:
    with pytest.raises(InputError, match="not valid GBNF"):
        write(grammar)


def test_a_vocabulary_must_be_there_and_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        write('root ::= "a"', vocabulary=tmp_path / "nix.gguf")
    assert caught.value.code == "NO_VOCABULARY"


@pytest.mark.parametrize(
    "grammar", ["root ::= " + "(" * 1000, "a" * 70_000, "root ::= \0", "\ud800"]
)
def test_what_would_bring_the_parser_down_does_not_reach_it(grammar: str) -> None:
    with pytest.raises(InputError) as caught:
        check_grammar(grammar)
    assert caught.value.code == "BAD_GRAMMAR"


def test_groups_in_quotes_do_not_count() -> None:
    many = "(" * 1000
    check_grammar(f'root ::= "{many}\\"{many}" [{many}\\]{many}] # {many}\n')


def test_a_grammar_that_is_too_long_does_not_leave_its_process() -> None:
    """A schema of some bytes may ask for any number of items: here for 15 MB."""
    schema = b'{"type": "array", "items": {"type": "integer"}, "minItems": 1000000}'
    command = [sys.executable, "-m", "shardmesh.engine.grammar_worker"]
    done = subprocess.run(command, input=schema, capture_output=True, check=False)
    assert len(done.stdout) == GRAMMAR_BYTES_MAX + 1
    with pytest.raises(InputError, match="too large"):
        grammar_of_json_schema(schema.decode())


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "nothing"}',
        '{"$ref": "https://example.org/schema"}',
        '{"type": "string", "pattern": "^(a{1,100000}){1,100000}$"}',
        '{"type": "array", "items": {"type": "string"}, "maxItems": 1000000000}',
    ],
)
def test_a_schema_that_cannot_be_done_is_refused(schema: str) -> None:
    with pytest.raises(InputError) as caught:
        grammar_of_json_schema(schema)
    assert caught.value.code == "BAD_SCHEMA"
