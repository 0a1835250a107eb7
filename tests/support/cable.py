"""A cable between two network namespaces that delays and loses packets, and can be pulled out.

`tc netem` would do the same, but many kernels come without it; this needs only Linux, root, `ip`
and /dev/net/tun.  The cable is a process of its own that carries IP packets from one end to the
other: `python cable.py NEAR FAR DELAY_S LOSS SEED`, where NEAR and FAR are names of namespaces.
It reads words from its input: `cut` and `join`.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NEAR_HOST, FAR_HOST = "10.77.0.1", "10.77.0.2"
TUNSETIFF = 0x400454CA  # linux/if_tun.h
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
CLONE_NEWNET = 0x40000000  # linux/sched.h
PACKET_BYTES_MAX = 65536
_COMMAND_TIMEOUT_S = 10.0


class Cable:
    """Both namespaces and the process between them."""

    def __init__(self, near: str, far: str, process: subprocess.Popen[str]) -> None:
        self.near = near
        self.far = far
        self._process = process

    def inside(self, namespace: str) -> tuple[str, ...]:
        """What stands before a command that is to run there."""
        return ("ip", "netns", "exec", namespace)

    def cut(self) -> None:
        """No packet gets through until `join`."""
        self._say("cut")

    def join(self) -> None:
        self._say("join")

    def _say(self, word: str) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(word + "\n")
            self._process.stdin.flush()


@contextmanager
def cable(*, delay_s: float, loss: float, seed: int = 1) -> Iterator[Cable]:
    """A cable with a delay and a share of lost packets in each direction.

    Skips the test where it cannot be had.
    """
    if shutil.which("ip") is None or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("needs Linux, root, `ip` (iproute2) and /dev/net/tun")
    names = [f"sm{os.getpid()}-{end}" for end in ("near", "far")]
    with ExitStack() as stack:
        try:
            for name in names:
                _do("ip", "netns", "add", name)
                stack.callback(_do, "ip", "netns", "del", name)
                _do("ip", "-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            words = error.stderr.decode(errors="replace").strip()
            pytest.skip(f"this machine lets nobody make network namespaces: {words}")
        words = [sys.executable, __file__, *names, str(delay_s), str(loss), str(seed)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(_end, process)
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            pytest.skip("this machine lets nobody make a TUN device in a network namespace")
        for name, here, there in zip(
            names, (NEAR_HOST, FAR_HOST), (FAR_HOST, NEAR_HOST), strict=True
        ):
            _do("ip", "-n", name, "address", "add", here, "peer", there, "dev", "cable")
            _do("ip", "-n", name, "link", "set", "cable", "mtu", "1400", "up")
        yield Cable(names[0], names[1], process)


def _do(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, timeout=_COMMAND_TIMEOUT_S)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(_COMMAND_TIMEOUT_S)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


# -- in the process of the cable ----------------------------------------------------------------


def open_end(namespace: str) -> int:
    """The descriptor of a new TUN device in a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (Path("/run/netns") / namespace).open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"cable", IFF_TUN | IFF_NO_PI))
    return device


def carry(near: int, far: int, delay_s: float, loss: float, seed: int) -> None:
    """Carries packets until its input ends."""
    chance = random.Random(seed)
    under_way: list[tuple[float, int, int, bytes]] = []  # (due, number, to, packet)
    n_packets, is_cut = 0, False
    other = {near: far, far: near}
    while True:
        patience_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready, _, _ = select.select([near, far, sys.stdin], [], [], patience_s)
        if sys.stdin in ready:
            word = sys.stdin.readline().strip()
            if not word:
                return
            is_cut = word == "cut"
        for end in (near, far):
            if end not in ready:
                continue
            packet = os.read(end, PACKET_BYTES_MAX)
            if not is_cut and chance.random() >= loss:
                n_packets += 1
                due_s = time.monotonic() + delay_s
                heapq.heappush(under_way, (due_s, n_packets, other[end], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(under_way)
            try:
                os.write(end, packet)
            except OSError:
                continue  # its other side is down: lost, like any packet


if __name__ == "__main__":
    ends = [open_end(name) for name in sys.argv[1:3]]
    print("ready", flush=True)
    carry(ends[0], ends[1], float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
