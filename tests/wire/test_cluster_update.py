"""The owner's change of the secret: believed only from the owner, for this cluster."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmesh.errors import ProtocolError
from shardmesh.swarm.identity import new_identity
from shardmesh.wire.cluster_secret import new_secret, owner_of
from shardmesh.wire.cluster_update import ClusterUpdate, open_update, sign_update
from shardmesh.wire.limits import CLUSTER_UPDATE_BYTES_MAX, REMOVED_NODES_MAX

OWNER, OTHER = new_identity(), new_identity()
SECRET = new_secret(OWNER.public_key)
REMOVED = tuple(new_identity().peer_id for _ in range(REMOVED_NODES_MAX))


def an_update(**changes: object) -> ClusterUpdate:
    fields = {"cluster": "home", "sequence": 7, "secret": SECRET.text(), "removed": (), **changes}
    return ClusterUpdate(**fields)  # type: ignore[arg-type]


def opened(signed: bytes) -> ClusterUpdate:
    return open_update(signed, cluster="home", owner=owner_of(OWNER.public_key))


def test_what_the_owner_signed_comes_out() -> None:
    update = an_update(removed=REMOVED)
    signed = sign_update(update, OWNER)
    assert len(signed) <= CLUSTER_UPDATE_BYTES_MAX
    assert opened(signed) == update
    assert opened(signed).new_secret() == SECRET


def test_repr_does_not_show_the_secret() -> None:
    assert SECRET.text() not in repr(an_update())


@pytest.mark.parametrize(
    ("update", "signer"),
    [
        (an_update(), OTHER),
        (an_update(cluster="work"), OWNER),
        (an_update(secret=new_secret(OTHER.public_key).text()), OWNER),
    ],
    ids=["signed by another", "of another cluster", "another owner from now on"],
)
def test_nobody_else_changes_it(update: ClusterUpdate, signer: object) -> None:
    with pytest.raises(ProtocolError) as caught:
        opened(sign_update(update, signer))  # type: ignore[arg-type]
    assert caught.value.code == "BAD_SIGNATURE"


@pytest.mark.parametrize(
    "changes",
    [{"secret": "sm1_x"}, {"removed": ("somebody",)}, {"removed": (*REMOVED, REMOVED[0])}],
)
def test_nonsense_is_refused_even_if_signed(changes: dict[str, object]) -> None:
    update = an_update()
    for name, value in changes.items():
        msgspec.structs.force_setattr(update, name, value)
    with pytest.raises(ProtocolError):
        opened(sign_update(update, OWNER))


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_one_changed_byte_is_refused(place: int, change: int) -> None:
    signed = bytearray(sign_update(an_update(), OWNER))
    signed[place % len(signed)] ^= change
    with pytest.raises(ProtocolError):
        opened(bytes(signed))


def test_one_byte_too_long_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        opened(bytes(CLUSTER_UPDATE_BYTES_MAX + 1))
    assert caught.value.code == "TOO_LARGE"
