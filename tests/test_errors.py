"""Errors: what travels comes back as what it was, and out of the groups of nurseries."""

from __future__ import annotations

import pytest
import trio

from shardmesh.errors import (
    BusyError,
    EngineError,
    GgufError,
    MomentError,
    OurError,
    ProtocolError,
    ShardmeshError,
    StorageError,
    TheirError,
    carried_past,
    error_from_wire,
    known_error,
    ungrouped,
)


@pytest.mark.parametrize("error", [BusyError("b"), EngineError("e"), GgufError("g")])
def test_an_error_travels_as_its_own_kind(error: ShardmeshError) -> None:
    found = error_from_wire(error.code, error.blame, str(error), "next")
    assert type(found) is type(error)
    assert (str(found), found.next_step) == (str(error), "next")


@pytest.mark.parametrize(
    ("blame", "kind"), [("ours", OurError), ("theirs", TheirError), ("moment", MomentError)]
)
def test_an_unknown_code_keeps_its_blame(blame: str, kind: type[ShardmeshError]) -> None:
    found = error_from_wire("NEVER_HEARD", blame, "s")  # type: ignore[arg-type]
    assert type(found) is kind
    assert found.code == "NEVER_HEARD"


def test_what_travels_is_fit_for_terminals_and_logs() -> None:
    found = error_from_wire("BUSY\n2026 all is well", "moment", "no\x1b[2J room", "wait\r\n")
    assert (found.code, str(found), found.next_step) == ("TRY_AGAIN", "no [2J room", "wait  ")
    assert error_from_wire("A" * 65, "theirs", "s").code == "BAD_REQUEST"


def test_what_the_disk_refuses_has_a_next_step() -> None:
    assert StorageError("no room").next_step
    assert StorageError("no room", next_step="leave").next_step == "leave"


async def fail_in_nurseries(error: Exception) -> None:
    with ungrouped():
        async with trio.open_nursery():
            async with trio.open_nursery():
                raise error


async def test_an_error_comes_out_of_nested_nurseries_as_itself() -> None:
    with pytest.raises(BusyError, match="no room"):
        await fail_in_nurseries(BusyError("no room"))


async def test_what_is_no_error_of_ours_stays_as_it_is() -> None:
    with pytest.raises(ExceptionGroup):
        await fail_in_nurseries(KeyError("ours to mend"))
    with pytest.raises(ProtocolError), ungrouped():
        raise ProtocolError("not grouped")


def test_ctrl_c_is_never_taken_for_an_error() -> None:
    group = BaseExceptionGroup("both", [KeyboardInterrupt(), BusyError("no room")])
    with pytest.raises(BaseExceptionGroup), ungrouped():
        raise group
    assert isinstance(known_error(group), BusyError)


async def fail_while_cancelled(error: Exception) -> None:
    with trio.CancelScope() as scope, carried_past() as block:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            with block():
                scope.cancel()
                raise error


async def test_an_error_is_carried_past_a_nursery_that_is_cancelled_meanwhile() -> None:
    with pytest.raises(KeyError, match="lost"):
        await fail_while_cancelled(KeyError("lost"))


async def fail_beside_the_block(error: Exception) -> None:
    with carried_past() as block:
        async with trio.open_nursery():
            with block():
                await trio.lowlevel.checkpoint()
            raise error


async def test_what_fails_beside_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(ExceptionGroup):
        await fail_beside_the_block(KeyError("in the nursery"))
