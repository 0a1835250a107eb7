"""Messages of links as an honest node would send them, and as none would."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from support.mesh import DIGEST, GREEDY

from shardmesh.wire.messages import HiddenBatch, OpenSession, TokenBatch

_ONE_ROW: Final = HiddenBatch(
    session=bytes(16),
    epoch=0,
    position=0,
    n_tokens=1,
    n_embd=8,
    dtype="f32",
    sample=True,
    timings=(),
    embed=False,
    branch=0,
    check=b"",
    scored=(),
    hand=False,
)

_ONE_TOKEN: Final = TokenBatch(
    session=bytes(16),
    epoch=0,
    position=0,
    tokens=(1,),
    sample=True,
    embed=False,
    branch=0,
    check=b"",
    scored=(),
    hand=False,
)
_ONLY_STAGE: Final = OpenSession(
    session=bytes(16),
    epoch=1,
    manifest_digest=DIGEST,
    layer_start=0,
    layer_end=4,
    n_ctx=8,
    previous_stage=None,
    next_stage=None,
    first_stage=None,
    last_stage=None,
    sampling=GREEDY,
    history=(),
    adapter="",
    wire="f32",
    draft_key=b"",
    prefix=(),
    take_over=False,
)


def hidden_batch(**fields: Any) -> HiddenBatch:
    """One row, eight numbers wide, behind which a token is sampled; but for these fields."""
    return msgspec.structs.replace(_ONE_ROW, **fields)


def token_batch(**fields: Any) -> TokenBatch:
    """One token, behind which one is sampled; but for these fields."""
    return msgspec.structs.replace(_ONE_TOKEN, **fields)


def open_session(**fields: Any) -> OpenSession:
    """A short session on a stage with all four layers; but for these fields."""
    return msgspec.structs.replace(_ONLY_STAGE, **fields)
