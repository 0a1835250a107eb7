"""Which shard a node serves: flags and manifest held against each other.  Pure."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable

from shardmesh.errors import InputError
from shardmesh.shards.manifest import Manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedShard:
    """What flags and variables say; None for what they leave open."""

    shard_id: int | None = None
    total_shards: int | None = None
    total_layers: int | None = None
    model_name: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a node is to serve, as far as it is known."""

    shard_id: int
    total_shards: int
    total_layers: int
    layer_start: int
    layer_end: int
    model_name: str
    manifest_digest: str


def assign(wanted: WantedShard, shard_id: int, manifest: Manifest | None) -> Assignment:
    """The assignment of a node to a shard.

    Without a manifest the node joins with what the flags say and an empty layer range.  Raises
    InputError (theirs) for a contradiction, which it names with both values.
    """
    if manifest is None:
        total_shards = wanted.total_shards or shard_id + 1
        _check_shard_id(shard_id, total_shards)
        return Assignment(
            shard_id=shard_id,
            total_shards=total_shards,
            total_layers=wanted.total_layers or 0,
            layer_start=0,
            layer_end=0,
            model_name=wanted.model_name or "",
            manifest_digest="",
        )
    _check_same("--total-shards", wanted.total_shards, len(manifest.shards))
    _check_same("--total-layers", wanted.total_layers, manifest.n_layer)
    _check_same("--model-name", wanted.model_name, manifest.model_name)
    _check_shard_id(shard_id, len(manifest.shards))
    entry = manifest.shards[shard_id]
    return Assignment(
        shard_id=shard_id,
        total_shards=len(manifest.shards),
        total_layers=manifest.n_layer,
        layer_start=entry.layer_start,
        layer_end=entry.layer_end,
        model_name=manifest.model_name,
        manifest_digest=manifest.digest(),
    )


def least_served(
    total_shards: int, served: Iterable[int], here: Collection[int] = frozenset()
) -> int:
    """The shard with the fewest replicas; of equals one whose file is `here`, then the lowest.

    `served` has one entry for each replica.  Raises InputError (theirs) when the number of shards
    is not known.
    """
    if total_shards < 1:
        raise InputError(
            "nobody says how many shards the model has",
            code="NO_SHARD_ID",
            next_step="give --shard-id, or put the split's manifest.json into --shards-dir",
        )
    n_replicas = Counter(served)
    return min(range(total_shards), key=lambda i: (n_replicas[i], i not in here, i))


MOVE_GAIN_MIN = 0.25
"""A move must raise what the weaker of both shards carries by so much: it costs a new start."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """A listener of the same split, as one that may move sees it."""

    peer_id: str
    shard_id: int
    n_parallel: int  # sequences at once; 0: not known yet
    is_loaded: bool
    is_draining: bool = False
    wants_to_leave: bool = False  # it takes sessions still, and waits whether others object

    @property
    def strength(self) -> int:
        """What it adds to what its shard carries."""
        return max(self.n_parallel, 1)


def better_shard(
    own: Serving, others: Iterable[Serving], total_shards: int, not_to: Collection[int] = ()
) -> int | None:
    """The shard that this node should serve instead of its own, if that clearly helps.

    That is the one that carries least, if with this node it carries clearly more and so does what
    is left behind.  While another replica of the own shard leaves or wants to, this one does not.
    """
    known = list(others)
    left = staying(own, known)
    if not own.is_loaded or own.is_draining or not left:
        return None
    if any(o.shard_id == own.shard_id and (o.is_draining or _goes_before(o, own)) for o in known):
        return None
    # One that is still loading will carry soon, so that not everybody comes to help.
    carried = Counter(dict.fromkeys(range(total_shards), 0))
    for other in known:
        carried[other.shard_id] += 0 if other.is_draining else other.strength
    weakest = min(
        (i for i in range(total_shards) if i != own.shard_id and i not in not_to),
        key=lambda i: (carried[i], i),
        default=None,
    )
    if weakest is None:
        return None
    weaker_after = min(sum(o.strength for o in left), carried[weakest] + own.strength)
    is_clear = weaker_after > carried[weakest] * (1 + MOVE_GAIN_MIN)
    return weakest if is_clear else None


def staying(own: Serving, others: Iterable[Serving]) -> list[Serving]:
    """Who goes on serving the shard of a node when that leaves it; with none it must not."""
    return [
        other
        for other in others
        if other.shard_id == own.shard_id and other.is_loaded and not other.is_draining
    ]


def _goes_before(other: Serving, own: Serving) -> bool:
    """Of those that want to leave a shard at once, the one with the lowest peer id goes."""
    return other.wants_to_leave and (not own.wants_to_leave or other.peer_id < own.peer_id)


def _check_same(flag: str, given: int | str | None, known: int | str) -> None:
    if given is not None and given != known:
        raise InputError(
            f"{flag} says {given}, the manifest says {known}",
            code="CONTRADICTION",
            next_step=f"leave {flag} out, or use the shards of the other split",
        )


def _check_shard_id(shard_id: int, total_shards: int) -> None:
    if not 0 <= shard_id < total_shards:
        raise InputError(
            f"there is no shard {shard_id}: the model has {total_shards}, numbered from 0",
            code="NO_SUCH_SHARD",
            next_step=f"give a --shard-id from 0 to {total_shards - 1}",
        )
