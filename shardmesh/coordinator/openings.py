"""What a stage is told when a session is opened on it, or when its neighbours change.  Pure."""

from __future__ import annotations

import dataclasses

from shardmesh.coordinator.chain import Replica
from shardmesh.coordinator.prefixes import PromptPrefix
from shardmesh.wire.hidden_states import EXACT, WireType
from shardmesh.wire.messages import NextStage, OpenSession, RepairSession, Sampling


@dataclasses.dataclass(frozen=True)
class SessionSettings:
    """What a session needs from its chain."""

    n_ctx: int
    sampling: Sampling
    piece_tokens: int  # of the prompt, in one micro-batch
    n_vocab: int | None = None  # tokens of the model; None where it is not known
    history: tuple[int, ...] = ()
    adapter: str = ""  # a LoRA adapter of the manifest
    wire: WireType = EXACT  # how hidden states travel from stage to stage
    prefix: PromptPrefix | None = None  # the prompt, if its beginning may be reused
    standby: bool = False  # other replicas keep copies of the KV
    hands_on: bool = False  # the last stage has a link to the first, for tokens that it may hand on


@dataclasses.dataclass(frozen=True)
class Place:
    """A stage's place in the chain of a session, in one epoch."""

    session: bytes
    epoch: int
    stages: tuple[Replica, ...]
    number: int
    hands_on: bool

    @property
    def stage(self) -> Replica:
        return self.stages[self.number]

    @property
    def previous(self) -> str | None:
        """Peer id of the stage before it."""
        return self.stages[self.number - 1].peer_id if self.number else None

    @property
    def following(self) -> NextStage | None:
        """None on the last stage."""
        return None if self._is_last else _address(self.stages[self.number + 1])

    @property
    def first(self) -> NextStage | None:
        """Where it hands tokens on: only the last stage does, in a chain of several."""
        if not (self.hands_on and self._is_last and self.number):
            return None
        return _address(self.stages[0])

    @property
    def last(self) -> str | None:
        """Peer id of who hands tokens on to it; None on all but the first stage."""
        if not self.hands_on or self.number or self._is_last:
            return None
        return self.stages[-1].peer_id

    @property
    def _is_last(self) -> bool:
        return self.number == len(self.stages) - 1


def _address(stage: Replica) -> NextStage:
    return NextStage(peer_id=stage.peer_id, addresses=stage.addresses)


def open_message(
    place: Place, settings: SessionSettings, draft_key: bytes, *, reuse: bool
) -> OpenSession:
    """Without `reuse`, in a repair, the stage has nothing but what it stood by with, if it did."""
    stage, is_last = place.stage, place.following is None
    prefix = settings.prefix if reuse else None
    peer_ids = [each.peer_id for each in place.stages[: place.number + 1]]
    return OpenSession(
        session=place.session,
        epoch=place.epoch,
        manifest_digest=stage.manifest_digest,
        layer_start=stage.layer_start,
        layer_end=stage.layer_end,
        n_ctx=settings.n_ctx,
        previous_stage=place.previous,
        next_stage=place.following,
        first_stage=place.first,
        last_stage=place.last,
        sampling=settings.sampling if is_last else None,
        history=settings.history if is_last else (),
        adapter=settings.adapter,
        wire=settings.wire,
        draft_key=draft_key if is_last else b"",
        prefix=prefix.pieces_for(peer_ids, settings.piece_tokens) if prefix is not None else (),
        take_over=settings.standby and not reuse,
    )


def repair_message(place: Place, branches: tuple[tuple[int, int], ...]) -> RepairSession:
    """For a stage that holds the session."""
    return RepairSession(
        session=place.session,
        epoch=place.epoch,
        previous_stage=place.previous,
        next_stage=place.following,
        first_stage=place.first,
        last_stage=place.last,
        branches=branches,
    )
