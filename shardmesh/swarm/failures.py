"""What libp2p says of a failed dial or stream, as errors of ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from libp2p.host.exceptions import StreamFailure
from libp2p.network.exceptions import SwarmException

from shardmesh.errors import RefusedError, ShardmeshError, UnreachableError

_IN_WORDS: Final = (
    (
        re.compile(r"peer id does not correspond .*remote_peer_id_from_pubkey=(\w{1,100}).*", re.S),
        r"another node answers there, \1",
    ),
    (
        re.compile(".*Connection closed during read operation.*", re.S),
        "the connection was closed before it was said who answers",
    ),
    (re.compile(".*msg_bytes.*", re.S), "what answers there is no node of Shardmesh"),
    (
        re.compile(".*IP address not found in multiaddr.*", re.S),
        "names are not looked up, an IP address is needed",
    ),
)
"""What libp2p says about things that happen to people, and what is said to them."""


def no_stream(peer_id: str, protocol: str, error: StreamFailure) -> ShardmeshError:
    """What it means that no protocol was agreed on."""
    reason = str(error.__cause__ or error)
    if "not supported" in reason:  # libp2p has one class for this and for a stream that broke
        return RefusedError(
            f"{peer_id} does not speak {protocol}",
            code="UNKNOWN_PROTOCOL",
            next_step="Check that it runs the same version of Shardmesh.",
        )
    return unreachable(peer_id, reason)


def dial_reason(error: SwarmException, addresses: Sequence[str]) -> str:
    """Why dialing failed; a single address need not be named once more."""
    reason = str(error)
    if len(addresses) == 1:
        reason = reason.removeprefix(addresses[0].partition("/p2p/")[0]).removeprefix(": ")
    return reason


def unreachable(whom: str, reason: str) -> UnreachableError:
    """The moment's fault: no answer of that node or these addresses."""
    for said, words in _IN_WORDS:
        reason = said.sub(words, reason)
    return UnreachableError(
        f"{whom} cannot be reached: {reason}",
        next_step="Check that the node runs and that its port is open.",
    )
