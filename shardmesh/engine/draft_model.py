"""A small model beside the coordinator that guesses what the large one will write.

It runs in a process of its own, which a thread of this one talks with: nothing waits for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shardmesh.confinement import without_settings
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import EngineError, InputError

logger = logging.getLogger(__name__)

ANSWER_CHARS_MAX = 8192
LOAD_TIMEOUT_S = 60.0
"""For a small model from a slow disk."""

END_TIMEOUT_S = 5.0

OnToken = Callable[[int], None]


def check_vocabulary(path: Path, tokenizer: Tokenizer) -> None:
    """Raises InputError (theirs) unless the model in `path` has the same tokens; takes a while."""
    with Tokenizer.open(path) as own:
        n_vocab = own.n_vocab
        is_same = n_vocab == tokenizer.n_vocab and all(
            own.piece(token) == tokenizer.piece(token) for token in range(n_vocab)
        )
    if not is_same:
        raise InputError(
            f"{path.name} has another vocabulary than the model",
            code="OTHER_VOCABULARY",
            next_step="use a draft model of the same family",
        )


class DraftModel:
    """The process and its thread; to be closed."""

    def __init__(self, path: Path, n_threads: int) -> None:
        """Loads the model, which takes a while.

        Raises InputError (theirs) if it cannot be used or is not loaded in LOAD_TIMEOUT_S,
        EngineError (ours) if no process can be started.
        """
        command = [sys.executable, "-m", "shardmesh.engine.draft_worker", str(path), str(n_threads)]
        try:
            self._process = subprocess.Popen(
                command,
                env=without_settings(os.environ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            raise EngineError(f"cannot start a process for the draft model: {error}") from error
        self._await_loaded(path)
        self._changed = threading.Condition()
        self._wanted: tuple[list[int], int, OnToken] | None = None
        self._is_closed = False
        self._held: list[int] = []  # what the process has computed
        self._thread = threading.Thread(target=self._work, name="draft model", daemon=True)
        self._thread.start()

    def _await_loaded(self, path: Path) -> None:
        deadline = threading.Timer(LOAD_TIMEOUT_S, self._process.kill)
        deadline.start()
        try:
            answer = self._answer()
        finally:
            deadline.cancel()
        if answer is None or answer["error"]:
            self._process.kill()
            self._process.communicate()
            why = answer["error"] if answer else "its process ended, or took too long"
            raise InputError(f"the draft model {path.name} cannot be used: {why}")

    def _answer(self) -> dict[str, Any] | None:
        """The next line of the process; None if it has ended."""
        try:
            line = self._process.stdout.readline(ANSWER_CHARS_MAX) if self._process.stdout else ""
            answer: dict[str, Any] | None = json.loads(line) if line else None
        except (OSError, ValueError):
            return None
        return answer

    def guess(self, text: Sequence[int], n_tokens: int, on_token: OnToken) -> None:
        """Calls `on_token`, from the thread, with each of the tokens that may come next.

        Takes the place of what was asked before.
        """
        with self._changed:
            self._wanted = (list(text), n_tokens, on_token) if n_tokens > 0 else None
            self._changed.notify()

    def close(self) -> None:
        """Ends process and thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._process.kill()
        self._thread.join(END_TIMEOUT_S)
        self._process.communicate()

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._wanted is None and not self._is_closed:
                    self._changed.wait()
                wanted = self._wanted
                if self._is_closed or wanted is None:
                    return
            text, n_tokens, on_token = wanted
            token = self._next_token(text)
            if token is None:
                logger.info("the draft model cannot go on; nothing more is guessed with it")
                return
            with self._changed:
                if self._wanted is not wanted:
                    continue  # asked for something else meanwhile
                self._wanted = ([*text, token], n_tokens - 1, on_token) if n_tokens > 1 else None
                on_token(token)

    def _next_token(self, text: list[int]) -> int | None:
        """None when the process cannot go on, or is gone."""
        n_same = 0
        for ours, theirs in zip(self._held, text[:-1], strict=False):
            if ours != theirs:
                break
            n_same += 1
        request = json.dumps({"n_keep": n_same, "tokens": text[n_same:]})
        answer = None
        with contextlib.suppress(OSError):  # it has ended
            if self._process.stdin is not None:
                self._process.stdin.write(request + "\n")
                self._process.stdin.flush()
                answer = self._answer()
        token: int | None = answer["token"] if answer else None
        self._held = text if token is not None else []
        return token
