"""What is kept on one hop: sent once in an epoch, in order, from wherever it is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.link_messages import token_batch

from shardmesh.errors import ProtocolError, UnreachableError
from shardmesh.links.outgoing import Outgoing
from shardmesh.wire.limits import REPLAY_BATCHES_IN_FLIGHT_MAX
from shardmesh.wire.messages import Message, TokenBatch

PLENTY = 1 << 30


class Hop:
    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []  # epoch, position
        self.is_broken = False

    def send(self, message: Message, body: bytes | memoryview = b"") -> None:
        if self.is_broken:
            raise UnreachableError("broken", code="LINK_LOST")
        assert isinstance(message, TokenBatch)
        self.sent.append((message.epoch, message.position))

    @property
    def positions(self) -> list[int]:
        return [position for _, position in self.sent]


def add(outgoing: Outgoing, position: int, n_tokens: int = 1) -> None:
    batch = token_batch(position=position, tokens=(1,) * n_tokens, sample=False)
    outgoing.add(position, n_tokens, batch)


def test_nothing_is_sent_before_the_first_hop_is_known() -> None:
    outgoing, hop = Outgoing(0, n_bytes_max=PLENTY), Hop()
    add(outgoing, 0)
    outgoing.resume(hop)
    add(outgoing, 1)
    assert hop.sent == [(0, 0), (0, 1)]


def test_a_new_hop_gets_all_in_the_new_epoch_and_then_what_comes() -> None:
    outgoing, old, new = Outgoing(0, n_bytes_max=PLENTY), Hop(), Hop()
    outgoing.resume(old)
    for position in range(3):
        add(outgoing, position)
    outgoing.hold(1)
    add(outgoing, 3)
    assert len(old.sent) == 3
    outgoing.resume(new, send_from=1, n_replay=4)
    add(outgoing, 4)
    assert new.sent == [(1, 1), (1, 2), (1, 3), (1, 4)]


def test_what_is_computed_again_goes_on_only_from_where_it_is_lacking() -> None:
    outgoing, hop = Outgoing(2, n_bytes_max=PLENTY), Hop()
    outgoing.resume(hop, send_from=3, n_replay=5)
    for position in range(6):
        add(outgoing, position)
        assert outgoing.n_done == position + 1
    assert hop.positions == [3, 4, 5]


def test_a_replay_waits_for_acknowledgements_and_what_is_new_keeps_its_place() -> None:
    outgoing, hop = Outgoing(0, n_bytes_max=PLENTY), Hop()
    n_replay = 3 * REPLAY_BATCHES_IN_FLIGHT_MAX
    for position in range(n_replay + 2):
        add(outgoing, position)
    outgoing.resume(hop, n_replay=n_replay)
    assert len(hop.sent) == REPLAY_BATCHES_IN_FLIGHT_MAX
    assert outgoing.n_done == REPLAY_BATCHES_IN_FLIGHT_MAX
    outgoing.taken(10)
    assert len(hop.sent) == REPLAY_BATCHES_IN_FLIGHT_MAX + 10
    outgoing.taken(10)  # said twice
    assert len(hop.sent) == REPLAY_BATCHES_IN_FLIGHT_MAX + 10
    for n_taken in range(n_replay + 1):
        outgoing.taken(n_taken)
    assert hop.positions == list(range(n_replay + 2))


def test_the_oldest_that_were_sent_are_forgotten_first() -> None:
    outgoing, hop = Outgoing(0, n_bytes_max=PLENTY, n_kept_max=4), Hop()
    for position in range(6):
        add(outgoing, position)
    assert outgoing.kept_from == 0  # none was sent
    outgoing.resume(hop)
    assert outgoing.kept_from == 2
    outgoing.hold(1)
    add(outgoing, 6)
    assert outgoing.kept_from == 2  # as the other side was told
    with pytest.raises(ProtocolError):
        outgoing.resume(hop, send_from=1)
    outgoing.resume(hop, send_from=2)
    assert hop.positions[6:] == [2, 3, 4, 5, 6]


def test_bytes_have_a_bound() -> None:
    outgoing, hop = Outgoing(0, n_bytes_max=100 * 64), Hop()
    outgoing.resume(hop)
    for position in range(0, 320, 32):
        add(outgoing, position, 32)
    assert outgoing.kept_from == 320 - 3 * 32


def test_a_position_inside_a_micro_batch_cannot_be_sent() -> None:
    outgoing = Outgoing(0, n_bytes_max=PLENTY)
    add(outgoing, 0, 4)
    with pytest.raises(ProtocolError):
        outgoing.resume(Hop(), send_from=2)


def test_a_hop_that_breaks_holds_what_it_did_not_take() -> None:
    outgoing, hop, other = Outgoing(0, n_bytes_max=PLENTY), Hop(), Hop()
    outgoing.resume(hop)
    add(outgoing, 0)
    hop.is_broken = True
    with pytest.raises(UnreachableError):
        add(outgoing, 1)
    add(outgoing, 2)
    outgoing.hold(1)
    outgoing.resume(other, send_from=1)
    assert other.sent == [(1, 1), (1, 2)]


def test_what_was_trimmed_is_gone() -> None:
    outgoing, hop = Outgoing(0, n_bytes_max=PLENTY), Hop()
    outgoing.resume(hop)
    for position in range(4):
        add(outgoing, position)
    outgoing.forget_from(2)
    add(outgoing, 1)  # computed before the trim was known
    add(outgoing, 2)
    assert hop.positions == [0, 1, 2, 3, 2]
    outgoing.forget_from(0)
    add(outgoing, 0, 4)
    outgoing.forget_from(2)
    assert outgoing.kept_from == 2


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=30), st.integers(1, 6))
def test_any_order_of_events_sends_each_position_once_in_an_epoch_and_in_order(
    events: list[tuple[int, int]], n_kept_max: int
) -> None:
    outgoing, hop = Outgoing(0, n_bytes_max=PLENTY, n_kept_max=n_kept_max), Hop()
    end = epoch = 0
    for kind, number in events:
        match kind:
            case 0:
                add(outgoing, end)
                end += 1
            case 1:
                epoch += 1
                outgoing.hold(epoch)
            case 2:
                if outgoing.kept_from <= number:
                    epoch += 1
                    outgoing.hold(epoch)
                    outgoing.resume(hop, send_from=number, n_replay=end)
            case _:
                outgoing.taken(number)
    by_epoch: dict[int, list[int]] = {}
    for sent_in, position in hop.sent:
        by_epoch.setdefault(sent_in, []).append(position)
    for positions in by_epoch.values():
        assert positions == list(range(positions[0], positions[0] + len(positions)))
