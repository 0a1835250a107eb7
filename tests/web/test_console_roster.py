from __future__ import annotations

import dataclasses

import pytest
from support.roster import NOW_S, announced, peer_id_of_number, roster_of

from shardmesh.web.roster import (
    OFFLINE_KEPT_S,
    OFFLINE_MAX,
    Change,
    Download,
    Report,
    changes_between,
    look,
    state_of,
)

FOUR = [announced(number) for number in range(4)]
PEERS = [a.peer_id for a in FOUR]
DOWNLOAD = Download(name="shard-0.gguf", n_bytes=100, n_bytes_done=40)
FETCHED = dataclasses.replace(DOWNLOAD, n_bytes_done=100, state="done")
FAILED = dataclasses.replace(DOWNLOAD, state="failed", error="the disk is full")


def kinds(changes: list[Change]) -> list[str]:
    return [change.kind for change in changes]


@pytest.mark.parametrize(
    ("loaded", "report", "is_busy", "state"),
    [
        (True, None, False, "online"),
        (True, None, True, "busy"),
        (False, None, False, "waiting"),
        (True, Report(), False, "online"),
        (True, Report(n_sessions=1), False, "busy"),
        (True, Report(answered=False), True, "suspect"),
        (False, Report(shard_state="loading"), False, "loading"),
        (True, Report(shard_state="failed", error="no memory"), False, "failed"),
        (True, Report(shard_state="draining", n_sessions=2), True, "draining"),
        (False, Report(shard_state="loaded"), False, "waiting"),
        (False, Report(shard_state="absent"), False, "waiting"),
        (False, Report(shard_state="absent", downloads=(DOWNLOAD,)), False, "downloading"),
        (False, Report(shard_state="absent", downloads=(FETCHED, FAILED)), False, "waiting"),
    ],
)
def test_state_of_a_node(loaded: bool, report: Report | None, is_busy: bool, state: str) -> None:
    assert state_of(announced(0, loaded=loaded), report, is_busy=is_busy) == state


def test_a_download_that_was_over_between_two_looks_is_told_of() -> None:
    def reported(*downloads: Download, answered: bool = True) -> dict[str, Report]:
        return {PEERS[0]: Report(answered=answered, downloads=downloads)}

    def told(first: dict[str, Report], then: dict[str, Report]) -> list[str]:
        before = roster_of(*FOUR, reports=first)
        after = look(before, FOUR, then, now_s=NOW_S + 1)
        return [k for k in kinds(changes_between(before, after)) if k.startswith("download")]

    assert told(reported(), reported(FETCHED)) == ["download.finished"]
    assert told(reported(), reported(FAILED)) == ["download.failed"]
    assert told(reported(FETCHED), reported(FETCHED)) == []
    assert told({}, reported(FETCHED)) == [], "of before this gateway asked"
    assert told(reported(answered=False), reported(FETCHED)) == []


def test_a_lost_node_is_shown_offline_once_and_for_a_while() -> None:
    before = roster_of(*FOUR)
    after = look(before, FOUR[1:], {}, now_s=NOW_S + 5)
    assert after[PEERS[0]].state == "offline"
    assert after[PEERS[0]].since_s == NOW_S + 5
    later = look(after, FOUR[1:], {}, now_s=NOW_S + 5 + OFFLINE_KEPT_S - 1)
    assert later[PEERS[0]].since_s == NOW_S + 5
    assert PEERS[0] not in look(later, FOUR[1:], {}, now_s=NOW_S + 5 + OFFLINE_KEPT_S)


def test_a_node_that_said_goodbye_is_not_shown() -> None:
    before = roster_of(*FOUR)
    after = look(before, FOUR[1:], {}, now_s=NOW_S, left=[PEERS[0]])
    assert PEERS[0] not in after
    changes = changes_between(before, after, left=[PEERS[0]])
    assert kinds(changes) == ["node.left", "model.incomplete"]
    assert changes[1].data["missing_layers"] == [(0, 1)]


def test_lost_nodes_are_bounded() -> None:
    many = [announced(number) for number in range(OFFLINE_MAX + 50)]
    assert len(look(roster_of(*many), [], {}, now_s=NOW_S)) == OFFLINE_MAX


def test_what_happens_when_a_node_is_lost_and_returns() -> None:
    there = roster_of(*FOUR)
    lost = look(there, FOUR[:3], {}, now_s=NOW_S + 1)
    assert kinds(changes_between(there, lost)) == ["node.lost", "model.incomplete"]
    back = look(lost, FOUR, {}, now_s=NOW_S + 2)
    assert back[PEERS[3]].state == "online"
    assert kinds(changes_between(lost, back)) == ["node.returned", "model.complete"]
    assert changes_between(back, look(back, FOUR, {}, now_s=NOW_S + 3)) == []


def test_what_happens_from_joining_to_serving() -> None:
    waiting = announced(0, loaded=False)
    steps = [
        ([], None, []),
        ([waiting], None, ["node.joined", "model.incomplete"]),
        (
            [waiting],
            Report(shard_state="absent", downloads=(DOWNLOAD,)),
            ["download.started"],
        ),
        (
            [waiting],
            Report(shard_state="loading", downloads=(FETCHED,)),
            ["shard.loading", "download.finished"],
        ),
        ([FOUR[0]], Report(), ["shard.loaded"]),
        ([FOUR[0]], Report(answered=False), ["node.silent"]),
        ([FOUR[0]], Report(n_sessions=2), ["node.answers"]),
        ([FOUR[0]], Report(shard_state="failed", error="killed"), ["shard.failed"]),
        ([FOUR[0]], Report(), ["shard.loaded"]),
        ([waiting], Report(shard_state="absent"), ["shard.unloaded"]),
        ([FOUR[0]], Report(), ["shard.loaded"]),
        ([waiting], Report(), ["shard.unloaded"]),  # it says so before it is asked again
    ]
    roster = roster_of(*FOUR[1:])
    for own, report, expected in steps:
        reports = {PEERS[0]: report} if report else {}
        after = look(roster, [*own, *FOUR[1:]], reports, now_s=NOW_S)
        told = kinds(changes_between(roster, after))
        assert [k for k in told if not k.startswith("model.")] == [
            k for k in expected if not k.startswith("model.")
        ]
        roster = after


def test_a_failure_tells_its_cause() -> None:
    before = roster_of(*FOUR)
    report = Report(shard_state="failed", error="the file is damaged")
    after = look(before, FOUR, {PEERS[2]: report}, now_s=NOW_S)
    (failed, incomplete) = changes_between(before, after)
    assert (failed.kind, failed.cause) == ("shard.failed", "the file is damaged")
    assert failed.data["peer_id"] == peer_id_of_number(2)
    assert incomplete.data["missing_layers"] == [(4, 7)]


def test_being_busy_is_no_event() -> None:
    before = roster_of(*FOUR)
    after = look(before, FOUR, {}, now_s=NOW_S, busy=PEERS)
    assert {node.state for node in after.values()} == {"busy"}
    assert changes_between(before, after) == []


def test_progress_of_a_download_is_no_event() -> None:
    reports = [
        Report(shard_state="absent", downloads=(dataclasses.replace(DOWNLOAD, n_bytes_done=n),))
        for n in (40, 60)
    ]
    waiting = announced(0, loaded=False)
    before = roster_of(waiting, reports={PEERS[0]: reports[0]})
    after = look(before, [waiting], {PEERS[0]: reports[1]}, now_s=NOW_S)
    assert changes_between(before, after) == []


def test_how_a_download_can_end() -> None:
    waiting = announced(0, loaded=False)
    ends = {(FETCHED,): "download.finished", (FAILED,): "download.failed", (): "download.ended"}
    for downloads, kind in ends.items():
        before = roster_of(
            waiting, reports={PEERS[0]: Report(shard_state="absent", downloads=(DOWNLOAD,))}
        )
        report = Report(shard_state="absent", downloads=downloads)
        (change,) = changes_between(
            before, look(before, [waiting], {PEERS[0]: report}, now_s=NOW_S)
        )
        assert (change.kind, change.data["file"]) == (kind, "shard-0.gguf")
        assert change.cause == ("the disk is full" if downloads == (FAILED,) else "")
