from __future__ import annotations

import pytest

from shardmesh.web.events import EventHub
from shardmesh.wire.limits import EVENTS_WAITING_MAX


async def test_every_reader_gets_what_is_published_while_it_listens() -> None:
    hub = EventHub(wall_clock=lambda: 7.0)
    hub.publish("node.joined")
    with hub.subscribe() as one, hub.subscribe() as other:
        hub.publish("node.left", cause="it said farewell", data={"peer_id": "a"})
        for reader in (one, other):
            event = await anext(reader)
            assert (event.number, event.at_s, event.kind) == (2, 7.0, "node.left")
            assert (event.cause, event.data) == ("it said farewell", {"peer_id": "a"})
    assert hub.n_readers == 0


async def test_a_reader_that_sleeps_loses_events_and_is_told() -> None:
    hub = EventHub()
    with hub.subscribe() as sleeper:
        for _ in range(EVENTS_WAITING_MAX + 3):
            hub.publish("node.joined")
        assert sleeper.n_lost == 3
        assert (await anext(sleeper)).number == 1


async def test_leaving_the_block_by_an_error_ends_the_subscription() -> None:
    hub = EventHub()
    with pytest.raises(ValueError, match="mine"), hub.subscribe():
        raise ValueError("mine")
    hub.publish("node.joined")
    assert hub.n_readers == 0
