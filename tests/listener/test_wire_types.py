"""How hidden states travel: exactly unless a session asks for less, with real shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chains import opened_chain
from support.link_messages import hidden_batch
from support.mesh import GREEDY, PIECE_TOKENS, memory_mesh
from support.models import write_model

from shardmesh.coordinator.generate import prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.engine.base import Hidden, MicroBatch, Output, TellToken
from shardmesh.engine.fake import fake_chain
from shardmesh.errors import ShardmeshError
from shardmesh.wire.hidden_states import WireType, hidden_to_body

PROMPT = list(range(1, 41))
EXACT_SETTINGS = SessionSettings(n_ctx=100, sampling=GREEDY, piece_tokens=PIECE_TOKENS)


class Recorder:
    """An engine that keeps the hidden states that it gets and gives."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.came: list[Hidden] = []
        self.went: list[Hidden] = []

    def compute(
        self, batch: Sequence[MicroBatch], tell_token: TellToken | None = None
    ) -> list[Output]:
        outputs: list[Output] = self._engine.compute(batch, tell_token)
        self.came += [micro.hidden for micro in batch if micro.hidden is not None]
        self.went += [output.hidden for output in outputs if output.hidden is not None]
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize("wire", ["f32", "f16"])
async def test_the_next_stage_gets_what_was_agreed_on(wire: WireType, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model.gguf", n_layer=4)
    with opened_chain(model, (2, 2), tmp_path / "shards") as chain:
        first, last = engines = [Recorder(engine) for engine in chain]
        async with memory_mesh(engines) as mesh:
            settings = dataclasses.replace(EXACT_SETTINGS, wire=wire)
            async with mesh.router.session(mesh.chain, mesh.links, settings) as session:
                done = await prefill(session, PROMPT)
    assert done.sampled is not None
    assert [len(rows) for rows in last.came] == [32, 8]
    for given, got in zip(first.went, last.came, strict=True):
        expected = given if wire == "f32" else given.astype(np.float16).astype(np.float32)
        assert got.tobytes() == expected.tobytes()
        assert (got.tobytes() == given.tobytes()) == (wire == "f32")


async def test_an_exact_session_takes_no_short_numbers() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, EXACT_SETTINGS) as session:
            body, dtype = hidden_to_body(np.ones((1, 8), dtype=np.float32), "f16")
            short = hidden_batch(session=session.session_id, dtype=dtype)
            mesh.link_between(0).send(short, body)
            with pytest.raises(ShardmeshError, match="exact ones were asked for"):
                await session.receive()
