"""An acceptor of links on a real port, and the grants that lead to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from support.far_end import Recorder

from shardmesh.links.dial import Acceptor
from shardmesh.links.link import Link
from shardmesh.wire.link_agreement import Endpoint, LinkGrant, LinkRequester, answer_request
from shardmesh.wire.messages import TrimSession

WORD = TrimSession(session=bytes(16), epoch=0, n_keep=1)
NOWHERE = (Endpoint(host="127.0.0.1", port=1),)


def new_grants(endpoints: tuple[Endpoint, ...] = NOWHERE) -> tuple[LinkGrant, LinkGrant]:
    """The dialing and the accepting side's view of one fresh link."""
    requester = LinkRequester("near", "far")
    offer, expected = answer_request(
        requester.request(), own_peer_id="far", other_peer_id="near", endpoints=endpoints
    )
    return requester.grant(offer), expected


@asynccontextmanager
async def accepting(user: Recorder) -> AsyncIterator[tuple[Acceptor, tuple[Endpoint, ...]]]:
    """An acceptor on a real port of this machine."""
    acceptor = Acceptor(user)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, acceptor.handle, listeners)
        yield acceptor, (Endpoint(host="127.0.0.1", port=port),)
        nursery.cancel_scope.cancel()


async def hears_word(link: Link, far_user: Recorder) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        link.send(WORD)
        await far_user.heard(1)
        link.close()
