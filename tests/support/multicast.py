"""Whether a test can have multicast."""

from __future__ import annotations

import socket


def loopback_has_multicast() -> bool:
    """Container networks and some hardened machines have none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        try:
            probe.sendto(b"", ("224.0.0.251", 5353))
        except OSError:
            return False
    return True
