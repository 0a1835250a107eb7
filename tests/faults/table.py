"""The fault table: what must hold, and the tests that prove it.

A row is proven by all tests whose id begins with one of its `tests`; what they note with
`record_property("measured", ...)` stands beside it.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
    """A fault, what must hold, and the tests that prove it."""

    fault: str
    target: str
    tests: tuple[str, ...]  # files or node ids below tests/


ROWS = (
    Row(
        "kill -9 of a stage in prefill, in decode, between send and reply",
        "same tokens, p99 recovery < 2 s, none twice",
        ("faults/test_kills.py::test_kill_of_a_stage",),
    ),
    Row(
        "kill -9 of a stage behind a long prompt",
        "same tokens; the pause grows with what is computed again",
        ("faults/test_kills.py::test_kill_behind_a_long_prompt",),
    ),
    Row(
        "two stages killed; a kill during recovery",
        "same tokens, < 5 s",
        (
            "faults/test_kills.py::test_two_stages_killed_at_once",
            "faults/test_kills.py::test_a_kill_during_a_recovery",
        ),
    ),
    Row(
        "no replica left",
        "a typed error that names the layer range in < 3 s; goes on when one joins",
        (
            "faults/test_kills.py::test_no_replica_left",
            "faults/test_kills.py::test_it_goes_on_when_a_replica_joins",
        ),
    ),
    Row(
        "data process segfaults or is killed for memory",
        "node stays; started again in < 1 s",
        ("faults/test_kills.py::test_a_data_process_that_dies",),
    ),
    Row(
        "SIGSTOP for 30 s",
        "rerouted < 2 s; its late answer refused",
        ("faults/test_kills.py::test_a_node_stopped_for_thirty_seconds",),
    ),
    Row(
        "a replica ten times slower",
        "avoided; p99 at most twice the healthy",
        ("faults/test_slow.py",),
    ),
    Row(
        "10 % loss, 100 ms round trip",
        "all complete, no false failover in 10 min",
        ("faults/test_network.py::test_a_lossy_and_slow_network",),
    ),
    Row(
        "a partition",
        "same tokens; the directories on both sides are right again within 10 s",
        ("faults/test_network.py::test_a_partition",),
    ),
    Row(
        "frames reordered, doubled, replayed",
        "same tokens, one KV write per position",
        (
            "coordinator/test_repair.py::test_frames_that_cannot_be_right_do_not_change_the_text",
            "listener/test_stage.py::test_frames_of_another_epoch_are_dropped_and_counted",
            "wire/test_sealing.py",
            "sim/test_simulation.py",
        ),
    ),
    Row(
        "bootstrap down",
        "running sessions do not notice; a new node joins through remembered ones in < 10 s",
        ("faults/test_coordinators.py::test_the_bootstrap_is_down",),
    ),
    Row(
        "coordinator killed",
        "KV free in < 30 s",
        ("faults/test_coordinators.py::test_a_coordinator_that_goes_away",),
    ),
    Row(
        "corrupt pieces, a poisoner among five seeds",
        "no bad byte loaded, download completes",
        (
            "swarm/test_torrent_harm.py::test_one_poisoner_among_five",
            "swarm/test_torrents.py::test_only_the_damaged_piece_comes_again",
        ),
    ),
    Row(
        "shard truncated or bit-flipped on disk",
        "found before load, fetched again",
        (
            "shards/test_store.py::test_a_flipped_byte_is_found",
            "shards/test_store.py::test_a_truncated_shard_is_found",
            "e2e/test_weights.py::test_a_flipped_bit_is_mended_before_the_shard_is_loaded",
        ),
    ),
    Row(
        "disk full, kill during rename",
        "typed error, nothing half-written visible, serving goes on",
        (
            "swarm/test_disk_room.py::test_no_room_before_anything_is_fetched",
            "swarm/test_disk_room.py::test_the_disk_becomes_full",
            "shards/test_split.py::test_a_disk_that_fills_up_is_the_persons_to_solve",
            "shards/test_split.py::test_a_rename_that_fails_takes_the_others_back",
            "shards/test_atomic.py",
        ),
    ),
    Row(
        "1,000 malformed frames; a claimed length of 4 GiB; depth 100,000",
        "typed refusals, memory growth < 10 MiB",
        (
            "links/test_hostile_connections.py::test_a_thousand_malformed_frames_take_no_memory",
            "wire/test_framing.py::test_a_record_that_is_only_claimed_takes_no_memory",
            "wire/test_codec.py::test_a_length_that_is_only_claimed_takes_no_memory",
            "wire/test_codec.py::test_what_is_nested_too_deep_is_refused",
        ),
    ),
    Row(
        "500 slow connections",
        "closed in 5 s, honest connect p99 < 500 ms",
        (
            "links/test_hostile_connections.py::test_five_hundred_slow_connections_are_closed_"
            "and_honest_ones_get_through",
            "swarm/test_hostile_strangers.py::test_five_hundred_slow_strangers_are_closed_"
            "and_members_get_through",
        ),
    ),
    Row(
        "1,000 sessions at once",
        "served or BUSY in < 100 ms, none starves, no prompt crosses over",
        ("faults/test_crowd.py",),
    ),
    Row(
        "cancellation at every checkpoint",
        "nothing leaks",
        ("sim/test_cancellation.py",),
    ),
    Row(
        "siege: a process killed every 10 s for 5 min",
        "sessions lost 0, every text the undisturbed one, nothing left behind",
        ("faults/test_siege.py",),
    ),
)
