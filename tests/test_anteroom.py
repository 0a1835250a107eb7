"""The room of those who have not shown who they are: bounded, and fair to newcomers."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from shardmesh.anteroom import Anteroom, Failures
from shardmesh.errors import BusyError
from shardmesh.wire.limits import (
    FAILED_CONNECTIONS_MAX,
    FAILED_CONNECTIONS_PERIOD_S,
    FAILING_ADDRESSES_MAX,
    HANDSHAKE_TIMEOUT_S,
)


class Visitor:
    """Waits in the room until it is sent away; remembers when that was."""

    def __init__(self, room: Anteroom, origin: str) -> None:
        self.room, self.origin = room, origin
        self.gone_s: float | None = None

    async def wait(self) -> None:
        with self.room.place(self.origin):
            await trio.sleep_forever()
        self.gone_s = trio.current_time()


async def test_nobody_stays_longer_than_a_handshake(autojump_clock: trio.testing.MockClock) -> None:
    room, begun_s = Anteroom(2), trio.current_time()
    visitor = Visitor(room, "")
    await visitor.wait()
    assert visitor.gone_s == begun_s + HANDSHAKE_TIMEOUT_S
    assert len(room) == 0


async def test_whoever_fills_the_room_loses_his_oldest_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    room, begun_s = Anteroom(4), trio.current_time()
    early = Visitor(room, "10.0.0.1")
    greedy = [Visitor(room, "10.0.0.9") for _ in range(3)]
    late = Visitor(room, "10.0.0.2")
    async with trio.open_nursery() as nursery:
        for visitor in (early, *greedy, late):
            nursery.start_soon(visitor.wait)
            await trio.testing.wait_all_tasks_blocked()
        assert len(room) == 4
        assert [v.gone_s for v in (early, *greedy, late)] == [None, begun_s, None, None, None]


async def test_who_has_shown_himself_is_not_counted(autojump_clock: trio.testing.MockClock) -> None:
    room = Anteroom(2)
    for _ in range(FAILED_CONNECTIONS_MAX + 1):
        with room.place("10.0.0.1"):
            pass
    assert len(room) == 0


async def test_what_is_raised_in_the_room_comes_out_and_counts() -> None:
    room = Anteroom(2)
    for _ in range(FAILED_CONNECTIONS_MAX):
        with pytest.raises(ValueError, match="nonsense"), room.place("10.0.0.1"):
            raise ValueError("nonsense")
    with pytest.raises(BusyError, match=r"10\.0\.0\.1 has tried in vain"):
        with room.place("10.0.0.1"):
            pass
    with room.place("10.0.0.2"):
        pass


def test_an_address_may_try_again_after_the_period() -> None:
    failures = Failures()
    for _ in range(FAILED_CONNECTIONS_MAX):
        failures.check("10.0.0.1", 7.0)
        failures.note("10.0.0.1", 7.0)
    with pytest.raises(BusyError):
        failures.check("10.0.0.1", 7.0 + FAILED_CONNECTIONS_PERIOD_S - 0.1)
    failures.check("10.0.0.1", 7.0 + FAILED_CONNECTIONS_PERIOD_S)
    failures.note("10.0.0.1", 7.0 + FAILED_CONNECTIONS_PERIOD_S)
    failures.check("10.0.0.1", 8.0 + FAILED_CONNECTIONS_PERIOD_S)


@pytest.mark.parametrize(
    ("one", "other", "together"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:3:4:5:6", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("10.0.0.1", "10.0.0.2", False),
        ("127.0.0.1", "127.0.0.1", False),
        ("::1", "::1", False),
        ("", "", False),
    ],
)
def test_what_is_counted_together(one: str, other: str, together: bool) -> None:
    failures = Failures()
    for _ in range(FAILED_CONNECTIONS_MAX):
        failures.note(one, 0.0)
    if together:
        with pytest.raises(BusyError):
            failures.check(other, 1.0)
    else:
        failures.check(other, 1.0)


def test_many_addresses_take_bounded_memory() -> None:
    failures = Failures()
    for number in range(FAILING_ADDRESSES_MAX + 100):
        failures.note(f"10.{number >> 16}.{(number >> 8) & 255}.{number & 255}", 0.0)
    assert len(failures._failed) == FAILING_ADDRESSES_MAX
