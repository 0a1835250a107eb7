"""A child process that answers JSON lines: how a benchmark talks with what it measures against."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from shardmesh.errors import OurError

Answer = dict[str, Any]

ANSWER_TIMEOUT_S: Final = 600.0
"""For loading a model or generating with it on a slow, busy machine."""

LINE_BYTES_MAX: Final = 1024 * 1024
END_TIMEOUT_S: Final = 2.0


class Child:
    """A running child; made by `open_child`."""

    def __init__(self, name: str, process: trio.Process) -> None:
        self._name = name
        self._process = process
        self._rest = b""

    async def ask(self, request: Answer) -> Answer:
        """The answer to one request; raises OurError if the child ends or is silent instead."""
        stdin = self._process.stdin
        try:
            with trio.fail_after(ANSWER_TIMEOUT_S):
                if stdin is not None:
                    await stdin.send_all(json.dumps(request).encode() + b"\n")
                answer: Answer = json.loads(await self._line())
                return answer
        except (trio.TooSlowError, trio.BrokenResourceError) as error:
            raise OurError(f"the process {self._name} does not answer") from error

    async def _line(self) -> bytes:
        stdout = self._process.stdout
        while b"\n" not in self._rest:
            data = await stdout.receive_some() if stdout is not None else b""
            if not data:
                raise OurError(f"the process {self._name} ended; see what it printed above")
            self._rest += data
            if len(self._rest) > LINE_BYTES_MAX:
                raise OurError(f"the process {self._name} answers too much")
        line, _, self._rest = self._rest.partition(b"\n")
        return line


@asynccontextmanager
async def open_child(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Child]:
    """`python -m MODULE ARGUMENTS` as a child that is gone when the block is left, however."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Child(module, process)
    finally:
        with trio.CancelScope(shield=True):
            await _end(process)


async def _end(process: trio.Process) -> None:
    """Closing its input asks the child to end, a kill makes it."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            await stream.aclose()
    with trio.move_on_after(END_TIMEOUT_S):
        await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


def serve_requests(answer: Callable[[Answer], Answer]) -> None:
    """The child's side: answers each line of standard input until that ends."""
    # Ctrl-C goes to the whole terminal; the parent decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints on standard output must not end up among the answers.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()
