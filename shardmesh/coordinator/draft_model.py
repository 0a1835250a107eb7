"""A draft model for as long as a session lasts: its guesses, brought to the loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from shardmesh.coordinator.drafts import Ask
from shardmesh.engine.draft_model import DraftModel, check_vocabulary
from shardmesh.engine.tokenizer import Tokenizer

N_THREADS = 1
"""The machine may serve a stage as well."""


@asynccontextmanager
async def open_draft_model(
    path: Path | None, tokenizer: Tokenizer, n_drafts: int | None
) -> AsyncIterator[Ask | None]:
    """What asks the model in `path`, None without one or if nothing is to be guessed.

    The process has ended when the block is left.  Raises InputError (theirs) for a model with
    another vocabulary than `tokenizer` or one that cannot be loaded, EngineError (ours) if there
    can be no process.
    """
    if path is None or n_drafts == 0:
        yield None
        return
    await trio.to_thread.run_sync(check_vocabulary, path, tokenizer)
    model = await trio.to_thread.run_sync(DraftModel, path, N_THREADS)
    loop = trio.lowlevel.current_trio_token()

    def ask(text: Sequence[int], n_tokens: int, on_token: Callable[[int], None]) -> None:
        model.guess(text, n_tokens, lambda token: loop.run_sync_soon(on_token, token))

    try:
        yield ask
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(model.close)
