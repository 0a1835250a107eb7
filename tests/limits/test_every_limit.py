"""Every limit has a test that goes one past it, or is a pace that nobody can go past.

A test counts if it names the limit.  Those that show it without naming it are listed here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from shardmesh.wire import limits

TESTS = Path(__file__).parent.parent
NAMES = sorted(name for name in vars(limits) if name.isupper() and name not in ("KIB", "MIB"))

PACES = {
    "BOOTSTRAP_PAUSE_MIN_S": "the first of our own pauses",
    "DECODE_ROUND_MAX": "in which order a stage works",
    "DHT_QUERY_TIMEOUT_S": "handed to the library",
    "DHT_PROVIDERS_MAX": "how many we ask the library for",
    "DIAL_STAGGER_S": "a head start",
    "DIRECTORY_FOLLOW_PAUSE_S": "how often we try",
    "DIRECTORY_PULL_INTERVAL_S": "how often we ask",
    "DIRECT_CONNECTIONS_MAX": "how many we dial without need",
    "DIAL_BACKS_MAX": "how many we dial at once; the others wait, and requests are bounded",
    "DRAFTS_MAX": "how many tokens we guess",
    "HEARTBEAT_INTERVAL_S": "how often we say that we live",
    "LAN_SEARCH_INTERVAL_S": "how often we search",
    "LAN_SEARCH_TIMEOUT_S": "how long we search",
    "LINK_STREAM_DELAY_S": "a head start",
    "LIVENESS_INTERVAL_S": "how often we ask",
    "LIVENESS_NODES_MAX": "whom we ask so often",
    "LOAD_INTERVAL_S": "how often we tell",
    "REACH_INTERVAL_S": "how often we ask",
    "REACH_OBSERVERS_MAX": "how many we ask",
    "RELAYS_PER_NODE_MAX": "how many places we take",
    "STREAM_CHUNK_BYTES": "what we read in one step",
    "STREAM_READ_AHEAD_CHUNKS": "what we read ahead",
    "TORRENT_ASK_INTERVAL_MAX_S": "how often we ask",
    "TORRENT_SOURCES_MAX": "handed to the library",
}
"""What we do ourselves so often or so much; nothing that comes from outside is held against it."""

OUTGOING = "links/test_outgoing.py"
RUNNING = "limits/test_one_past_running.py"
SHOWN_BY = {
    "BOOTSTRAP_PAUSE_MAX_S": "swarm/test_membership.py::test_pauses_grow_and_are_bounded",
    "CHAT_ANSWER_CHARS_MAX": f"{RUNNING}::test_an_answer_of_the_template_process",
    "COMMAND_TIMEOUT_S": "swarm/test_swarm_commands.py::test_too_long_a_wait",
    "HANDSHAKES_MAX": "test_anteroom.py::test_whoever_fills_the_room_loses_his_oldest_place",
    "HTTP_CONNECTIONS_MAX": f"{RUNNING}::test_connections_at_once",
    "IDLE_TIMEOUT_S": "swarm/test_host.py::test_idle_connection_is_closed_and_a_wanted_one_kept",
    "REQUESTS_WAITING_MAX": "web/test_queue.py::test_a_full_queue_is_busy",
    "RELAY_BYTES_PER_S_MAX": "swarm/test_relay.py::test_the_pace_of_a_circuit",
    "STREAM_OPEN_TIMEOUT_S": f"{RUNNING}::test_a_protocol_that_is_not_agreed_on_in_time",
    "REPLAY_RESULTS_KEPT_MAX": f"{OUTGOING}::test_the_oldest_that_were_sent_are_forgotten_first",
}
"""Tests that set a smaller bound instead of naming the limit, below `tests/`."""


def _named() -> set[str]:
    """All words of the tests that show what the product does."""
    words: set[str] = set()
    for path in TESTS.rglob("test_*.py"):
        if path != Path(__file__) and path.parent.name != "docs":
            words |= set(re.findall(r"[A-Z][A-Z_]+", path.read_text("utf-8")))
    return words


NAMED = _named()


@pytest.mark.parametrize("name", NAMES)
def test_a_limit_has_a_test(name: str) -> None:
    kinds = [name in PACES, name in SHOWN_BY or name in NAMED]
    assert any(kinds), f"no test goes one past {name}"


@pytest.mark.parametrize("where", sorted(set(SHOWN_BY.values())))
def test_the_test_that_shows_it_is_there(where: str) -> None:
    path, _, name = where.partition("::")
    tree = ast.parse((TESTS / path).read_text("utf-8"))
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, functions)}


def test_nothing_else_is_listed() -> None:
    assert (PACES.keys() | SHOWN_BY.keys()) <= set(NAMES)
    assert len(NAMES) > 140
