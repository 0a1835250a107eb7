"""`hop`: hidden states one way between two processes, over a real link and over a bare socket.

Then the same over a libp2p stream between two control processes, and over a relay between these.

Half of a round trip: the other process sends back what it gets.  The bare socket (blocking, no
encryption, no messages) says what this machine's kernel takes of it.
"""

from __future__ import annotations

import dataclasses
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final

import trio

from benchmarks.child import Child, open_child
from benchmarks.hop_echo import LENGTH_BYTES, receive_exactly
from benchmarks.results import Result
from shardmesh.errors import OurError, ShardmeshError
from shardmesh.links.dial import dial
from shardmesh.links.link import Link
from shardmesh.wire.link_agreement import Endpoint, LinkGrant, LinkRequester
from shardmesh.wire.messages import HiddenBatch, Message

FRAMES: Final = {"hop-16k": 4, "hop-64k": 16, "hop-1m": 256}
"""Name -> rows of N_EMBD numbers in f32."""

WAYS: Final = ("stream", "relay")
"""Ways of a link that is not direct; measured with the smaller frames of these names."""

FRAMES_OF_WAYS: Final = ("hop-16k", "hop-64k")

N_EMBD: Final = 1024
N_WARM_UP: Final = 50
N_ROUND_TRIPS: Final = {"hop-16k": 300, "hop-64k": 300, "hop-1m": 60}
ROUND_TRIP_TIMEOUT_S: Final = 10.0


class Pitcher:
    """The user of the dialing end: throws a frame and waits until it comes back."""

    def __init__(self) -> None:
        self._returned = trio.Event()
        self._n_body = 0

    def on_message(self, link: Link, message: Message, body: memoryview) -> None:
        self._n_body = len(body)
        self._returned.set()

    def on_all_read(self, link: Link) -> None:
        pass

    def on_suspected(self, link: Link) -> None:
        pass

    def on_closed(self, link: Link, error: ShardmeshError) -> None:
        self._returned.set()

    async def throw(self, link: Link, message: Message, body: bytes) -> float:
        """Seconds of one round trip; raises OurError if the frame does not come back."""
        self._returned, self._n_body = trio.Event(), 0
        started_s = time.perf_counter()
        with trio.move_on_after(ROUND_TRIP_TIMEOUT_S):
            link.send(message, body)
            await self._returned.wait()
        elapsed_s = time.perf_counter() - started_s
        if self._n_body != len(body):
            raise OurError("a frame did not come back")
        return elapsed_s


async def measure_hops(*, runs: int, progress: Callable[[str], None]) -> list[Result]:
    """One result for each size of FRAMES over a direct link, then those of WAYS."""
    results: list[Result] = []
    for way in (None, *WAYS):
        async with AsyncExitStack() as stack:
            child = await stack.enter_async_context(open_child("benchmarks.hop_echo"))
            pitcher = Pitcher()
            controls = [
                await stack.enter_async_context(open_child("benchmarks.hop_control"))
                for _ in range(3 if way is not None else 0)
            ]
            for control in controls:  # a link is offered for some seconds only: all must be up
                await control.ask({"ready": True})
            grant = await _agree(child)
            if way is not None:
                grant = await _led_over(way, grant, controls)
            link = await dial(grant, pitcher)
            nursery = await stack.enter_async_context(trio.open_nursery())
            nursery.start_soon(link.run)
            bare = stack.enter_context(await _open_bare(child))
            for name in FRAMES if way is None else FRAMES_OF_WAYS:
                measured = await _measure(name, link, pitcher, bare, runs=runs, progress=progress)
                label = name if way is None else f"{name}-{way}"
                results.append(dataclasses.replace(measured, name=label))
            link.close()
    return results


async def _led_over(way: str, grant: LinkGrant, controls: list[Child]) -> LinkGrant:
    """The grant without direct endpoints: control processes carry it, a relay between them."""
    relay, accepting, dialing = controls
    through = (await relay.ask({"relay": True}))["addresses"] if way == "relay" else []
    accept = {"accept": grant.endpoints[0].port, "through": through}
    addresses = (await accepting.ask(accept))["addresses"]
    dialed = await dialing.ask({"dial": addresses, "link_id": grant.link_id.hex()})
    stream = Endpoint(host="127.0.0.1", port=dialed["port"])
    return dataclasses.replace(grant, endpoints=(), stream=stream)


async def _measure(
    name: str,
    link: Link,
    pitcher: Pitcher,
    bare: socket.socket,
    *,
    runs: int,
    progress: Callable[[str], None],
) -> Result:
    message, body = _batch(FRAMES[name])
    for _ in range(N_WARM_UP):
        await pitcher.throw(link, message, body)
    over_link: list[float] = []
    over_bare: list[float] = []
    for run in range(runs):
        progress(f"{name}: run {run + 1} of {runs}")
        for _ in range(N_ROUND_TRIPS[name]):
            over_link.append(await pitcher.throw(link, message, body) / 2 * 1e3)
        over_bare += await trio.to_thread.run_sync(_throw_bare, bare, body, N_ROUND_TRIPS[name])
    median_ms = round(statistics.median(over_link), 4)
    return Result(
        name=name,
        mesh={"ms": median_ms, "p95_ms": _p95(over_link), "frame_bytes": len(body)},
        baseline={"ms": round(statistics.median(over_bare), 4), "p95_ms": _p95(over_bare)},
        runs=runs,
        ms=median_ms,
    )


def _p95(values: list[float]) -> float:
    return round(statistics.quantiles(values, n=20)[-1], 4)


def _batch(n_tokens: int) -> tuple[HiddenBatch, bytes]:
    message = HiddenBatch(
        session=bytes(16),
        epoch=0,
        position=0,
        n_tokens=n_tokens,
        n_embd=N_EMBD,
        dtype="f32",
        sample=False,
        embed=False,
        branch=0,
        check=b"",
        scored=(),
        hand=False,
        timings=(),
    )
    return message, bytes(4 * n_tokens * N_EMBD)


async def _agree(child: Child) -> LinkGrant:
    """Agrees on a link as two nodes do, with the child's pipes in place of a libp2p stream."""
    requester = LinkRequester("benchmark", "echo")
    answer = await child.ask({"link": requester.request().hex()})
    return requester.grant(bytes.fromhex(answer["offer"]))


async def _open_bare(child: Child) -> socket.socket:
    answer = await child.ask({"bare": True})
    bare = socket.create_connection(("127.0.0.1", answer["port"]), ROUND_TRIP_TIMEOUT_S)
    bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bare


def _throw_bare(bare: socket.socket, body: bytes, n_round_trips: int) -> list[float]:
    """Milliseconds of halves of round trips; the calling thread waits in the kernel."""
    times_ms = []
    buffer = memoryview(bytearray(len(body)))
    for _ in range(n_round_trips):
        started_s = time.perf_counter()
        bare.sendall(len(body).to_bytes(LENGTH_BYTES, "big") + body)
        if not receive_exactly(bare, buffer):
            raise OurError("the echo ended")
        times_ms.append((time.perf_counter() - started_s) / 2 * 1e3)
    return times_ms
