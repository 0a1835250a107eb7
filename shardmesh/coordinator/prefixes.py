"""What the pieces of a prompt are called, so that stages can tell which of them they hold.  Pure.

A name stands for all tokens up to the end of its piece.  It is a keyed digest, so that a stage
learns only that two prompts of one asker begin alike.  The key is another one for each asker,
model, adapter and stage: askers never share, and a name that a stage has heard is of no use at
another one.  It also covers the stages before, since what a stage holds was made of what they sent:
whatever one of them did wrong does not outlive it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Sequence

from shardmesh.coordinator.pieces import whole_borders
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.shards.manifest import Manifest
from shardmesh.wire.hidden_states import EXACT, WireType
from shardmesh.wire.limits import PREFIX_PIECES_MAX
from shardmesh.wire.messages import PrefixPiece

DIGEST_BYTES = 16
_KEY_BYTES = 32


@dataclasses.dataclass(frozen=True)
class PromptPrefix:
    """A prompt whose beginning may be reused, and the key of whoever asks; not printed."""

    tokens: tuple[int, ...] = dataclasses.field(repr=False)
    key: bytes = dataclasses.field(repr=False)

    def pieces_for(self, stages: Sequence[str], piece_tokens: int) -> tuple[PrefixPiece, ...]:
        """The whole pieces as a stage hears of them: the last of `stages`, behind the others.

        Peer ids, in the order of the chain.
        """
        key = self.key
        for peer_id in stages:
            key = _derive(key, peer_id.encode())
        named: list[PrefixPiece] = []
        digest, start = b"", 0
        for end in whole_borders(len(self.tokens), piece_tokens)[:PREFIX_PIECES_MAX]:
            data = digest + struct.pack(f"<{end - start}I", *self.tokens[start:end])
            digest = hashlib.blake2b(data, key=key, digest_size=DIGEST_BYTES).digest()
            named.append(PrefixPiece(end=end, digest=digest))
            start = end
        return tuple(named)

    def n_reusable(self, n_held: int, piece_tokens: int) -> int:
        """Of so many positions that all stages hold, those to begin behind.

        Whole pieces, and at least one token is left to compute, or nothing could be sampled.
        """
        n_most = min(n_held, len(self.tokens) - 1)
        return max(whole_borders(n_most, piece_tokens), default=0)


def prefix_of(
    prompt: Sequence[int], request: CompletionRequest, manifest: Manifest, secret: bytes
) -> PromptPrefix | None:
    """What may be reused of a prompt; None if the request or the model does not allow it.

    `secret` is the coordinator's, 32 bytes.
    """
    if request.score_prompt or not (request.reuse_prefix and manifest.can_roll_back):
        return None
    key = asker_key(
        secret,
        tenant=request.tenant,
        manifest_digest=manifest.digest(),
        adapter=request.adapter,
        wire=request.wire,
    )
    return PromptPrefix(tuple(prompt), key)


def asker_key(
    secret: bytes, *, tenant: str, manifest_digest: str, adapter: str, wire: WireType = EXACT
) -> bytes:
    """The key behind all names of one asker's prompts for one model, adapter and type on the wire.

    `secret` is the coordinator's; `tenant` is for whom it asks, empty for itself.
    """
    key = _derive(secret, b"shardmesh prefix 1")
    for part in (tenant, manifest_digest, adapter, wire):
        key = _derive(key, part.encode())
    return key


def _derive(key: bytes, part: bytes) -> bytes:
    return hashlib.blake2b(part, key=key, digest_size=_KEY_BYTES).digest()
