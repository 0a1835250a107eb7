"""Grammars are tried in a process of their own, once, and it ends whatever they are like."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing
from support.grammars import OPENS_FOR_EVER, SAMPLES_FOR_EVER
from support.models import BUILT_IN
from support.vocabularies import write_vocabulary

import shardmesh.coordinator.grammar_proofs as proofs_module
from shardmesh.coordinator.grammar_proofs import AT_ONCE_MAX, GrammarProofs
from shardmesh.errors import BusyError, EngineError, InputError
from shardmesh.wire.limits import GRAMMAR_BYTES_MAX

GOOD = 'root ::= ("yes" | "no") "!"'
NEVER = r"root ::= [^\x00-\U7FFFFFFF]"
NO_ROOT = 'nix ::= "a"'


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("v") / "v.gguf", BUILT_IN, "")


@pytest.fixture
def n_tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """What processes were started for; in the end none of them is there."""
    tried: list[Path] = []
    command = proofs_module.prover.prove_command

    def counted(path: Path) -> list[str]:
        tried.append(path)
        return command(path)

    before = set(psutil.Process().children())
    monkeypatch.setattr(proofs_module.prover, "prove_command", counted)
    yield tried
    assert set(psutil.Process().children()) <= before


async def refusal(proofs: GrammarProofs, grammar: str, vocabulary: Path) -> str:
    with pytest.raises(InputError) as caught:
        await proofs.prove(grammar, vocabulary)
    assert caught.value.code == "BAD_GRAMMAR"
    return str(caught.value)


@pytest.mark.processes
async def test_each_grammar_is_tried_once(vocabulary: Path, n_tried: list[Path]) -> None:
    proofs = GrammarProofs()
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(proofs.prove, GOOD, vocabulary)
    assert len(n_tried) <= AT_ONCE_MAX
    await proofs.prove(GOOD, vocabulary)
    n_before = len(n_tried)
    assert "not valid GBNF" in await refusal(proofs, NO_ROOT, vocabulary)
    assert "not valid GBNF" in await refusal(proofs, NO_ROOT, vocabulary)
    assert "no token" in await refusal(proofs, NEVER, vocabulary)
    assert len(n_tried) == n_before + 2


@pytest.mark.processes
@pytest.mark.parametrize("grammar", [OPENS_FOR_EVER, SAMPLES_FOR_EVER], ids=["open", "sample"])
async def test_a_grammar_without_end_is_refused(
    grammar: str, vocabulary: Path, n_tried: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs_module, "GRAMMAR_WORK_TIMEOUT_S", 2.0)
    assert "takes too much" in await refusal(GrammarProofs(), grammar, vocabulary)
    assert len(n_tried) == 1


@pytest.mark.processes
async def test_a_refusal_is_looked_at_again_later_and_the_oldest_is_forgotten(
    vocabulary: Path, n_tried: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs_module, "REFUSED_S", 0.0)
    monkeypatch.setattr(proofs_module, "VERDICTS_KEPT_MAX", 1)
    proofs = GrammarProofs()
    for grammar in (NO_ROOT, NO_ROOT):
        await refusal(proofs, grammar, vocabulary)
    assert len(n_tried) == 2
    for grammar in (GOOD, GOOD + "\n", GOOD):
        await proofs.prove(grammar, vocabulary)
    assert len(n_tried) == 5


@pytest.mark.processes
async def test_what_is_known_is_not_read_again(
    vocabulary: Path, n_tried: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long grammar takes 10 ms to read, beside all the answers that are streamed meanwhile."""
    read: list[str] = []
    check = proofs_module.check_grammar

    def counted(grammar: str) -> None:
        read.append(grammar)
        check(grammar)

    monkeypatch.setattr(proofs_module, "check_grammar", counted)
    proofs = GrammarProofs()
    for _ in range(3):
        await proofs.prove(GOOD, vocabulary)
        await refusal(proofs, NO_ROOT, vocabulary)
    assert read == [GOOD, NO_ROOT]
    await refusal(proofs, GOOD + "\ud800", vocabulary)


@pytest.mark.processes
async def test_without_a_vocabulary_nothing_is_said_of_the_grammar(tmp_path: Path) -> None:
    proofs = GrammarProofs()
    for _ in range(2):
        with pytest.raises(EngineError, match="vocabulary"):
            await proofs.prove(GOOD, tmp_path / "nix.gguf")


async def test_what_is_too_long_or_too_deep_needs_no_process(
    vocabulary: Path, n_tried: list[Path]
) -> None:
    proofs = GrammarProofs()
    await refusal(proofs, "x" * (GRAMMAR_BYTES_MAX + 1), vocabulary)
    await refusal(proofs, "root ::= " + "(" * 100, vocabulary)
    assert not n_tried


@pytest.mark.processes
async def test_whoever_leaves_takes_the_process_along(
    vocabulary: Path, n_tried: list[Path]
) -> None:
    proofs = GrammarProofs()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(proofs.prove, OPENS_FOR_EVER, vocabulary)
        while not n_tried:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    await proofs.prove(GOOD, vocabulary)  # and the place is free


async def test_nobody_waits_for_a_place_for_ever(
    vocabulary: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def hangs(*args: object, **options: object) -> subprocess.CompletedProcess[bytes]:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(trio, "run_process", hangs)
    monkeypatch.setattr(proofs_module, "GRAMMAR_WORK_TIMEOUT_S", math.inf)
    proofs = GrammarProofs()
    turned_away = trio.Event()

    async def ask(number: int) -> None:
        with pytest.raises(BusyError):
            await proofs.prove(f"{GOOD} # {number}", vocabulary)
        turned_away.set()

    async with trio.open_nursery() as nursery:
        for number in range(AT_ONCE_MAX + 1):
            nursery.start_soon(ask, number)
        await turned_away.wait()
        nursery.cancel_scope.cancel()
