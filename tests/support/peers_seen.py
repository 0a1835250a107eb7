"""Asks a node again and again which replicas it knows: `python peers_seen.py PORT`.

Runs in the network namespace of the node.  Prints a line whenever the number of loaded replicas is
another one: the time on the clock that all processes of a machine share (`time.monotonic`), and the
number.
"""

from __future__ import annotations

import http.client
import json
import sys
import time

PAUSE_S = 0.1
TIMEOUT_S = 5.0


def n_loaded(connection: http.client.HTTPConnection) -> int:
    """How many replicas the node knows whose shard is loaded."""
    connection.request("GET", "/v1/peers")
    peers = json.loads(connection.getresponse().read())
    return sum(peer["capabilities"]["shard_loaded"] for peer in peers)


def watch(port: int) -> None:
    """Prints until it is killed, or the node does not answer any more."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    n_before = None
    while True:
        n_now = n_loaded(connection)
        if n_now != n_before:
            print(time.monotonic(), n_now, flush=True)
        n_before = n_now
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    watch(int(sys.argv[1]))
