"""Embeddings over stages with fake engines."""

from __future__ import annotations

import numpy as np
import pytest
from support.mesh import GREEDY, memory_mesh

from shardmesh.coordinator.embed import EMBEDDING_TOKENS, Embedding, embed_tokens
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.engine.base import MicroBatch
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.errors import ProtocolError
from shardmesh.wire.messages import BatchDone

N_CTX = 2 * EMBEDDING_TOKENS


@pytest.mark.parametrize("n_tokens", [1, 5, EMBEDDING_TOKENS, EMBEDDING_TOKENS + 7])
async def test_a_chain_gives_the_embedding_of_one_engine(n_tokens: int) -> None:
    tokens = [i % 60 for i in range(n_tokens)]
    whole = FakeEngine(fake_info(n_ctx=N_CTX, n_batch_tokens_max=N_CTX))
    whole.open_sequence(0)
    micro = MicroBatch(sequence=0, position=0, tokens=tuple(tokens), want_embedding=True)
    expected = whole.compute([micro])[0].embedding
    assert expected is not None
    settings = SessionSettings(n_ctx=N_CTX, sampling=GREEDY, piece_tokens=EMBEDDING_TOKENS)
    stages = [
        FakeEngine(
            fake_info(*layers, 4, n_ctx=N_CTX, n_batch_tokens_max=N_CTX), layer_start=layers[0]
        )
        for layers in ((0, 1), (1, 4))
    ]
    async with memory_mesh(stages) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, settings) as session:
            found = await embed_tokens(session, tokens)
    assert found.n_tokens == n_tokens
    assert found.values.tobytes() == expected.tobytes()


def test_unit_has_length_one_and_nothing_stays_nothing() -> None:
    unit = Embedding(np.array([3.0, 4.0], dtype=np.float32), 1).unit()
    assert unit.dtype == np.float32
    assert unit.tolist() == pytest.approx([0.6, 0.8])
    assert Embedding(np.zeros(2, dtype=np.float32), 1).unit().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("data", [b"abc", np.array([1, np.nan], dtype="<f4").tobytes()])
def test_an_embedding_that_is_not_numbers_is_refused(data: bytes) -> None:
    done = BatchDone(
        session=bytes(16),
        epoch=0,
        position=0,
        n_tokens=1,
        sampled=None,
        timings=(),
        embedding=data,
        scores=(),
        handed=False,
    )
    with pytest.raises(ProtocolError):
        done.embedding_values()
