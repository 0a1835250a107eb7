"""A control process for `hop`: a relay, or either side of a link that goes over a libp2p stream."""

from __future__ import annotations

import threading

import trio

from benchmarks.child import Answer, serve_requests
from shardmesh.coordinator.link_streams import carry_to_data_port, open_link_streams
from shardmesh.swarm.addresses import circuit_addresses
from shardmesh.swarm.host import ByteStream, Host, open_host
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.relay import Relay, reserve
from shardmesh.wire.link_agreement import LINK_STREAM_PROTOCOL, Endpoint

CONNECT_TIMEOUT_S = 10.0


class Control:
    """One libp2p host on a trio loop in a thread of its own."""

    def __init__(self) -> None:
        self._started = threading.Event()
        threading.Thread(target=trio.run, args=(self._run,), daemon=True).start()
        self._started.wait()

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with (
            open_host(new_identity(), listen_host="127.0.0.1") as self._host,
            open_link_streams(self._host) as self._streams,
        ):
            self._started.set()
            await trio.sleep_forever()

    def answer(self, request: Answer) -> Answer:
        """Does what is asked, on the loop."""
        return trio.from_thread.run(self._answer, request, trio_token=self._token)

    async def _answer(self, request: Answer) -> Answer:
        host = self._host
        if "relay" in request:
            Relay(host).serve()
        elif "ready" in request:
            return {}
        elif "accept" in request:
            self._accept(host, request["accept"])
            if request["through"]:
                await _hide_behind(host, request["through"])
        else:
            peer_id = await host.connect(request["dial"], CONNECT_TIMEOUT_S)
            link_id = bytes.fromhex(request["link_id"])
            return {"port": self._streams.expect(link_id, peer_id).port}
        return {"addresses": host.addresses()}

    def _accept(self, host: Host, port: int) -> None:
        async def serve(stream: ByteStream, peer_id: str) -> None:
            await carry_to_data_port(stream, Endpoint(host="127.0.0.1", port=port))

        host.serve(LINK_STREAM_PROTOCOL, serve, lasting=True)


async def _hide_behind(host: Host, addresses: list[str]) -> None:
    """Is reached through that relay only."""
    relay_id = await host.connect(addresses, CONNECT_TIMEOUT_S)
    given = await reserve(host, relay_id)
    host.hide()
    host.come_through({relay_id}, circuit_addresses(relay_id, addresses, given.addresses))


if __name__ == "__main__":
    serve_requests(Control().answer)
