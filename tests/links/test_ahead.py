"""Links that are brought up before anybody needs them."""

from __future__ import annotations

from typing import cast

import trio
import trio.testing

from shardmesh.links.ahead import LOOK_AGAIN_S, LinksAhead
from shardmesh.links.dial import LinkPool
from shardmesh.wire.messages import NextStage

NEAR, FAR = (NextStage(peer_id=name, addresses=(f"of {name}",)) for name in ("near", "far"))


class AskedPool:
    """Notes whom it was asked for, and when."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []

    def dial_soon(self, peer_id: str, addresses: tuple[str, ...], timeout_s: float) -> None:
        assert addresses == (f"of {peer_id}",)
        self.asked.append((trio.current_time(), peer_id))


async def test_all_that_are_wanted_are_dialed_at_once_and_looked_after(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pool = AskedPool()
    ahead = LinksAhead(cast(LinkPool, pool), 5.0)
    ahead.keep([NEAR])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ahead.run)
        await trio.sleep(1)
        assert pool.asked == [(0, "near")]
        ahead.keep([NEAR, FAR])
        await trio.sleep(LOOK_AGAIN_S + 1)
        assert pool.asked[1:3] == [(1, "near"), (1, "far")]
        assert pool.asked[3:] == [(1 + LOOK_AGAIN_S, "near"), (1 + LOOK_AGAIN_S, "far")]
        ahead.keep([])
        await trio.sleep(3 * LOOK_AGAIN_S)
        assert len(pool.asked) == 5
        nursery.cancel_scope.cancel()
