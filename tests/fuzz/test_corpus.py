"""The corpus: what is good is read, everything else is a ShardmeshError, and so are neighbours."""

from __future__ import annotations

import itertools
import random
import time
import typing
from pathlib import Path

import pytest
from fuzz import CORPUS_DIR, altered, case, corpus, findings, try_one
from support.fuzz_targets import TARGETS

from shardmesh.errors import ShardmeshError
from shardmesh.wire.framing import RecordReader
from shardmesh.wire.messages import Message, decode_message

FILES = [pytest.param(name, path, id=path.name) for name in TARGETS for path in corpus(name)]


def test_every_target_has_good_and_bad_inputs() -> None:
    assert {path.name for path in CORPUS_DIR.iterdir()} == set(TARGETS)
    for name in TARGETS:
        kinds = {path.name.split("-")[0] for path in corpus(name)}
        assert kinds == {"good", "bad"}, name


def test_every_message_of_a_link_has_a_good_input() -> None:
    found: set[type] = set()
    for path in corpus("stream"):
        if path.name.startswith("good-"):
            records = RecordReader().feed(path.read_bytes())
            found |= {type(decode_message(record)[0]) for record in records}
    assert found == set(typing.get_args(Message))


@pytest.mark.parametrize(("name", "path"), FILES)
def test_an_input_of_the_corpus(name: str, path: Path) -> None:
    if path.name.startswith("good-"):
        TARGETS[name](path.read_bytes())
        return
    with pytest.raises(ShardmeshError):
        TARGETS[name](path.read_bytes())


def test_some_altered_inputs_with_a_fixed_seed() -> None:
    tried = findings(1, iter(range(3000)), time.monotonic() + 30)
    assert [(number, why) for number, _, _, why in tried if why is not None] == []


def test_a_case_can_be_had_again() -> None:
    inputs = {name: [path.read_bytes() for path in corpus(name)] for name in TARGETS}
    for number in range(20):
        assert case(7, number, inputs) == case(7, number, inputs)
    assert len({case(7, number, inputs) for number in range(20)}) == 20


def test_an_altered_input_is_seldom_the_same() -> None:
    generator = random.Random(1)
    data = bytes(range(100))
    n_same = sum(altered(data, data, generator) == data for _ in range(200))
    assert n_same < 20
    assert all(altered(b"", b"", generator) is not None for _ in range(50))


def test_another_exception_and_a_slow_parser_are_findings(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: bytes) -> None:
        raise KeyError("not documented")

    clock = itertools.count(0.0, 10.0)
    monkeypatch.setitem(TARGETS, "stream", fail)
    assert "KeyError" in (try_one("stream", b"") or "")
    monkeypatch.setitem(TARGETS, "stream", lambda data: None)
    assert try_one("stream", b"") is None
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    assert try_one("stream", b"") == "took 10.0 s"
