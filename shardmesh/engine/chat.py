"""Chat messages to tokens, with the template that the model file brings along."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from shardmesh.confinement import without_settings
from shardmesh.engine.tokenizer import Tokenizer
from shardmesh.errors import EngineError, InputError
from shardmesh.wire.limits import (
    CHAT_ANSWER_CHARS_MAX,
    CHAT_RENDER_TIMEOUT_S,
    CHAT_TEMPLATE_CHARS_MAX,
    PROMPT_BYTES_MAX,
)

Message = Mapping[str, Any]
"""`{"role": ..., "content": ...}` and whatever else the template understands."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class ChatTemplate:
    """A model's template in a process of its own, started when it is first needed.

    Usable from several threads; `close` ends the process.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises InputError (theirs) if the model has no template."""
        template = tokenizer.chat_template
        if not template:
            raise InputError("the model has no chat template", next_step="run without --chat")
        if len(template) > CHAT_TEMPLATE_CHARS_MAX:
            raise InputError(
                f"the chat template has more than {CHAT_TEMPLATE_CHARS_MAX} characters"
            )
        self._tokenizer = tokenizer
        self._template = template
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None

    def render(self, messages: Sequence[Message], **variables: Any) -> str:
        """The prompt as text; `variables` such as `tools` go to the template.

        Raises InputError (theirs) if the template fails, refuses or takes too long.
        """
        wanted = {
            "template": self._template,
            "variables": {
                "add_generation_prompt": True,
                "bos_token": self._tokenizer.bos_text,
                "eos_token": self._tokenizer.eos_text,
                **variables,
                "messages": list(messages),
            },
        }
        with _not_too_deep():
            request = json.dumps(wanted)
        if len(request) > PROMPT_BYTES_MAX + CHAT_TEMPLATE_CHARS_MAX:
            raise InputError("the messages are too long", code="PROMPT_TOO_LONG")
        answer = self._ask(request)
        if "error" in answer:
            raise InputError(f"the chat template of the model {answer['error']}")
        text = answer["text"]
        if _SURROGATE.search(text):
            raise InputError("the messages hold half of a surrogate pair")
        return text

    def encode(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The prompt as tokens.

        Control tokens come from the template only: where a message spells one out, it stays text.
        Raises InputError (theirs) as `render` does.
        """
        marks = _Marks(self._tokenizer.control_texts)
        with _not_too_deep():
            hidden = [marks.hide(message) for message in messages]
        rendered = self.render(hidden, **variables)
        bos = self._tokenizer.bos
        has_bos = bool(self._tokenizer.bos_text) and rendered.startswith(self._tokenizer.bos_text)
        tokens = [bos] if bos is not None and self._tokenizer.adds_bos and not has_bos else []
        for text, is_spelled_out in marks.split(rendered):
            tokens += self._tokenizer.encode(
                text, add_special=False, parse_special=not is_spelled_out
            )
        return tokens

    def close(self) -> None:
        with self._lock:
            self._end_worker()

    def _ask(self, request: str) -> dict[str, str]:
        """One line there, one line back; the process is killed at the deadline."""
        with self._lock:
            worker = self._running_worker()
            deadline = threading.Timer(CHAT_RENDER_TIMEOUT_S, worker.kill)
            deadline.start()
            try:
                answer = _exchange(worker, request)
            finally:
                deadline.cancel()
            if not answer:
                self._end_worker()
                raise InputError(
                    "the chat template of the model took too long or too much",
                    next_step="use another model, or run without --chat",
                )
        parsed: dict[str, str] = json.loads(answer)
        return parsed

    def _running_worker(self) -> subprocess.Popen[str]:
        if self._worker is not None and self._worker.poll() is not None:
            self._end_worker()  # ended meanwhile, for its memory or by a deadline just met
        if self._worker is None:
            command = [sys.executable, "-m", "shardmesh.engine.chat_worker"]
            try:
                self._worker = subprocess.Popen(
                    command,
                    env=without_settings(os.environ),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    encoding="utf-8",
                )
            except OSError as error:
                raise EngineError(f"cannot start a process for chat templates: {error}") from error
        return self._worker

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


@contextmanager
def _not_too_deep() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise InputError("the messages or tools are nested too deeply") from None


def _exchange(worker: subprocess.Popen[str], request: str) -> str:
    """The answering line; empty if the process is gone, be it in the middle of the line."""
    if worker.stdin is None or worker.stdout is None:
        raise EngineError("the process for chat templates has no pipes")
    try:
        worker.stdin.write(request + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline(CHAT_ANSWER_CHARS_MAX)
    except BrokenPipeError:
        return ""
    return answer if answer.endswith("\n") else ""


class _Marks:
    """Stand-ins for control texts inside of messages, while the template runs."""

    def __init__(self, control_texts: Sequence[str]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, control_texts)) or r"(?!)")
        self._salt = secrets.token_hex(8)  # a message cannot guess it and forge a mark
        self._hidden: list[str] = []

    def hide(self, value: Any) -> Any:
        """The value with a mark in place of each control text in its strings."""
        if isinstance(value, str):
            return self._pattern.sub(self._replace, value)
        if isinstance(value, Mapping):
            return {key: self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """Parts of the rendered text; true for those that a message spelled out."""
        parts = re.split(f"{self._salt}x([0-9]+)x", rendered)
        return [
            (self._hidden[int(part)], True) if i % 2 else (part, False)
            for i, part in enumerate(parts)
            if part
        ]

    def _replace(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._salt}x{len(self._hidden) - 1}x"
