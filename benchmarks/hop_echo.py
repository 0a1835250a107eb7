"""The other end of `hop`: a child that sends back what it gets, over a link and a bare socket."""

from __future__ import annotations

import socket
import threading
from typing import Final

import trio

from benchmarks.child import Answer, serve_requests
from shardmesh.errors import ShardmeshError
from shardmesh.links.dial import Acceptor
from shardmesh.links.link import Link
from shardmesh.wire.link_agreement import Endpoint, LinkGrant, answer_request
from shardmesh.wire.messages import Message

ACCEPT_TIMEOUT_S: Final = 10.0
LENGTH_BYTES: Final = 4


class Echo:
    """The user of the accepting end."""

    def on_message(self, link: Link, message: Message, body: memoryview) -> None:
        link.send(message, body)

    def on_all_read(self, link: Link) -> None:
        pass

    def on_suspected(self, link: Link) -> None:
        pass

    def on_closed(self, link: Link, error: ShardmeshError) -> None:
        """Nothing belongs to the link; the parent ends this process."""


def receive_exactly(stream: socket.socket, buffer: memoryview) -> bool:
    """Fills the buffer; False if the stream ends before."""
    n_received = 0
    while n_received < len(buffer):
        n_new = stream.recv_into(buffer[n_received:])
        if not n_new:
            return False
        n_received += n_new
    return True


def _answer(request: Answer) -> Answer:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    if "bare" in request:
        threading.Thread(target=_echo_bare, args=(listener,), daemon=True).start()
        return {"port": port}
    offer, grant = answer_request(
        bytes.fromhex(request["link"]),
        own_peer_id="echo",
        other_peer_id="benchmark",
        endpoints=(Endpoint(host="127.0.0.1", port=port),),
    )
    threading.Thread(target=trio.run, args=(_echo_link, listener, grant), daemon=True).start()
    return {"offer": offer.hex()}


async def _echo_link(listener: socket.socket, grant: LinkGrant) -> None:
    acceptor = Acceptor(Echo())
    acceptor.expect(grant)
    async with trio.SocketListener(_trio_socket(listener)) as accepting:
        with trio.fail_after(ACCEPT_TIMEOUT_S):
            stream = await accepting.accept()
        await acceptor.handle(stream)


def _trio_socket(listener: socket.socket) -> trio.socket.SocketType:
    listener.setblocking(False)
    return trio.socket.from_stdlib_socket(listener)


def _echo_bare(listener: socket.socket) -> None:
    with listener:
        listener.settimeout(ACCEPT_TIMEOUT_S)
        stream, _ = listener.accept()
    with stream:
        stream.settimeout(None)  # idle while the link is measured; the process ends with its parent
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        head = bytearray(LENGTH_BYTES)
        while receive_exactly(stream, memoryview(head)):
            body = bytearray(int.from_bytes(head, "big"))
            if not receive_exactly(stream, memoryview(body)):
                return
            stream.sendall(body)


if __name__ == "__main__":
    serve_requests(_answer)
