"""Grammars tried in a process of their own before a stage has to follow them."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from shardmesh.confinement import without_settings
from shardmesh.engine import grammar_prover as prover
from shardmesh.engine.grammar import BAD_GRAMMAR, SIMPLER, check_grammar
from shardmesh.errors import BusyError, EngineError, InputError
from shardmesh.wire.limits import GRAMMAR_WORK_TIMEOUT_S

AT_ONCE_MAX: Final = 2
"""Processes that try grammars, each of which may take a whole core."""

PLACE_TIMEOUT_S: Final = 2 * GRAMMAR_WORK_TIMEOUT_S
"""For one of these places."""

VERDICTS_KEPT_MAX: Final = 256
"""The oldest is forgotten first; each is some hundred bytes."""

REFUSED_S: Final = 60.0
"""A grammar that was refused is tried again after so long: this machine may have been busy."""

_TOO_MUCH: Final = -1


class GrammarProofs:
    """What came of the grammars that were tried of late, and the processes that try them."""

    def __init__(self) -> None:
        self._places = trio.Semaphore(AT_ONCE_MAX)
        self._verdicts = OrderedDict[bytes, tuple[int, float]]()  # with the time of each

    async def prove(self, grammar: str, vocabulary: Path) -> None:
        """Tries a grammar with the vocabulary in a GGUF file, unless that was done before.

        Raises InputError (theirs, BAD_GRAMMAR) for one that is none, that allows nothing, or that
        takes too long or too much memory; BusyError (the moment's) if too many are being tried;
        EngineError (ours) without a vocabulary.  A cancellation kills the process.
        """
        data = grammar.encode("utf-8", "surrogatepass")  # what is no text is refused below
        key = hashlib.sha256(os.fsencode(vocabulary) + b"\0" + data).digest()
        verdict = self._known(key)
        if verdict is None:
            await trio.to_thread.run_sync(check_grammar, grammar)
            async with self._place():
                verdict = self._known(key)  # another request may have brought the same
                if verdict is None:
                    verdict = await _try(grammar, vocabulary)
                    self._keep(key, verdict)
        _raise_refusal(verdict)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        try:
            with trio.fail_after(PLACE_TIMEOUT_S):
                await self._places.acquire()
        except trio.TooSlowError:
            raise BusyError("too many grammars are being tried") from None
        try:
            yield
        finally:
            self._places.release()

    def _known(self, key: bytes) -> int | None:
        if key not in self._verdicts:
            return None
        verdict, told_s = self._verdicts[key]
        is_old = trio.current_time() - told_s > REFUSED_S
        return verdict if verdict == prover.GOOD or not is_old else None

    def _keep(self, key: bytes, verdict: int) -> None:
        if verdict == prover.NO_VOCABULARY:
            return  # that says nothing about the grammar
        self._verdicts[key] = verdict, trio.current_time()
        self._verdicts.move_to_end(key)
        while len(self._verdicts) > VERDICTS_KEPT_MAX:
            self._verdicts.popitem(last=False)


async def _try(grammar: str, vocabulary: Path) -> int:
    try:
        with trio.fail_after(GRAMMAR_WORK_TIMEOUT_S):
            done = await trio.run_process(
                prover.prove_command(vocabulary),
                stdin=grammar.encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
                deliver_cancel=_kill,
                # A graphics card would only take its time to begin.
                env={**without_settings(os.environ), "CUDA_VISIBLE_DEVICES": ""},
            )
    except trio.TooSlowError:
        return _TOO_MUCH
    except OSError as error:
        raise EngineError(f"cannot start a process for grammars: {error.strerror}") from error
    return done.returncode


async def _kill(process: trio.Process) -> None:
    process.kill()


def _raise_refusal(verdict: int) -> None:
    """Raises what a grammar is refused with, if it is."""
    if verdict == prover.NO_VOCABULARY:
        raise EngineError(
            "the model's vocabulary cannot be read, so the grammar was not tried",
            next_step="look at the tokenizer.gguf of the model on this machine",
        )
    if verdict == prover.NO_GBNF:
        raise InputError(
            "the grammar is not valid GBNF",
            code=BAD_GRAMMAR,
            next_step="llama.cpp's grammars/README.md describes the form; the rule `root` must be "
            "there, and no rule may begin with itself",
        )
    if verdict == prover.DEAD_END:
        raise InputError("the grammar leaves no token to begin with", code=BAD_GRAMMAR)
    if verdict != prover.GOOD:
        raise InputError(
            f"the grammar takes too much memory, or more than {GRAMMAR_WORK_TIMEOUT_S:.0f} s, "
            "before the first words are written",
            code=BAD_GRAMMAR,
            next_step=SIMPLER,
        )
