"""One text, in sessions whose stages may be replaced meanwhile, and what it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from support.mesh import PIECE_TOKENS, MemoryMesh, written_tokens
from support.replicated import SAMPLED, one_engine_tokens

from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.session import Session
from shardmesh.wire.messages import Sampling

PROMPT = [i % 60 for i in range(3 * PIECE_TOKENS + 5)]
N_TOKENS = 12


def whole_tokens(sampling: Sampling = SAMPLED, n_tokens: int = N_TOKENS) -> list[int]:
    """What one engine with all layers gives."""
    return one_engine_tokens(PROMPT, n_tokens, temperature=sampling.temperature, seed=sampling.seed)


async def write(
    session: Session,
    n_tokens: int = N_TOKENS,
    before: Mapping[int, Callable[[], None]] = MappingProxyType({}),
) -> list[int]:
    """The text; calls `before[n]` when n tokens have come."""
    return await written_tokens(session, PROMPT, n_tokens, before)


def session_of(mesh: MemoryMesh, sampling: Sampling = SAMPLED, timeout_s: float = 10.0):  # type: ignore[no-untyped-def]
    settings = SessionSettings(n_ctx=300, sampling=sampling, piece_tokens=PIECE_TOKENS)
    return mesh.router.session(
        mesh.chain, mesh.links, settings, replacements=mesh.replacements(timeout_s)
    )
