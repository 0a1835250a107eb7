"""The socket option for connections that carry little."""

from __future__ import annotations

import socket
import sys

import pytest
import trio
import trio.testing
from support.accepting import accepting, hears_word, new_grants
from support.far_end import Recorder

from shardmesh.links.dial import dial
from shardmesh.links.resending import TCP_THIN_LINEAR_TIMEOUTS, resend_steadily


def is_set(stream: trio.SocketStream) -> bool:
    return stream.getsockopt(socket.IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS) != 0  # type: ignore[operator]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has it")
async def test_both_ends_of_a_link_send_again_steadily(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[trio.abc.Stream] = []

    def tell(stream: trio.abc.Stream) -> None:
        resend_steadily(stream)
        told.append(stream)

    monkeypatch.setattr("shardmesh.links.link.resend_steadily", tell)
    far_user = Recorder()
    async with accepting(far_user) as (acceptor, endpoints):
        grant, expected = new_grants(endpoints)
        acceptor.expect(expected)
        link = await dial(grant, Recorder())
        near, far = told
        assert isinstance(near, trio.SocketStream)
        assert isinstance(far, trio.SocketStream)
        assert is_set(near)
        assert is_set(far)
        await hears_word(link, far_user)


async def test_connections_of_another_kind_are_left_as_they_are() -> None:
    one, other = socket.socketpair()
    with other:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(one)) as stream:
            resend_steadily(stream)
    resend_steadily(trio.testing.memory_stream_pair()[0])
