"""What the nodes tell about themselves, asked in turn and never faster than a budget allows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import trio

from shardmesh.errors import ShardmeshError
from shardmesh.swarm.commands import get_metrics
from shardmesh.swarm.directory import Directory
from shardmesh.swarm.host import Host
from shardmesh.web.meters import RateMeter, TripMeter
from shardmesh.web.roster import Download, Report
from shardmesh.wire.announcement import Announcement, Capabilities
from shardmesh.wire.codec import convert
from shardmesh.wire.limits import TEXT_BYTES_MAX

ASK_TIMEOUT_S: Final = 3.0
"""A node that has not answered after so long is suspect."""

ASK_INTERVAL_S: Final = 1.0
"""Between two questions to one node while somebody looks on."""

ASK_INTERVAL_MOVING_S: Final = 0.25
"""And while that node loads or fetches something: a bar is to move."""

ASK_INTERVAL_UNSEEN_S: Final = 10.0
"""While nobody looks on."""

NEWS_PAUSE_S: Final = 0.02
"""A node that has announced something since the last question is asked as soon as this allows."""

NEWS_PAUSE_UNSEEN_S: Final = 1.0
"""And while nobody looks on: what happens is to be remembered."""

QUESTIONS_PER_S_MAX: Final = 20
"""A question costs a few milliseconds of this loop; in a large mesh each node waits longer."""

QUESTIONS_WAITING_MAX: Final = 32
"""Questions without an answer at once; silent nodes do not keep the others from being asked."""

DOWNLOADS_SHOWN_MAX: Final = 16

Text = Annotated[str, msgspec.Meta(max_length=TEXT_BYTES_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class _Download(msgspec.Struct, frozen=True):
    """An entry of `downloads` in GET_METRICS, as `swarm.torrents.progress.DownloadProgress`."""

    file_name: Text
    state: Text
    n_bytes_done: Count = 0
    n_bytes_total: Count = 0
    rate_bytes_per_s: Annotated[float, msgspec.Meta(ge=0, lt=2**53)] = 0.0
    eta_s: Annotated[float, msgspec.Meta(ge=0, lt=2**53)] | None = None
    n_sources: Count = 0
    error: Text = ""

    def shown(self) -> Download:
        return Download(
            name=self.file_name,
            state=self.state,
            n_bytes=self.n_bytes_total,
            n_bytes_done=self.n_bytes_done,
            bytes_per_s=self.rate_bytes_per_s,
            n_sources=self.n_sources,
            remaining_s=self.eta_s,
            error=self.error,
        )


class _Metrics(msgspec.Struct, frozen=True):
    """What is used of an answer to GET_METRICS."""

    shard_state: Text
    shard_error: Text | None = None
    n_sessions: Count = 0
    data_memory_bytes: Count = 0
    stage: dict[str, Any] = {}
    downloads: tuple[_Download, ...] = ()


def report_of(data: object, round_trip_ms: float) -> tuple[Report, int]:
    """A node's answer as a report, without its rate, and the tokens that it has computed so far.

    Raises ProtocolError (theirs) for an answer that is none.
    """
    metrics = convert(data, _Metrics)
    stage = {name: n for name, n in metrics.stage.items() if isinstance(n, int)}
    report = Report(
        round_trip_ms=round(round_trip_ms, 2 if round_trip_ms < 10 else 1),
        shard_state=metrics.shard_state,
        error=metrics.shard_error or "",
        n_sessions=metrics.n_sessions,
        memory_bytes=metrics.data_memory_bytes,
        n_kv_tokens=stage.get("n_kv_tokens"),
        n_sequences_kept=stage.get("n_sequences_kept", 0),
        n_copies=stage.get("n_copies", 0),
        copy_bytes=stage.get("copy_bytes", 0),
        copy_bytes_sent=stage.get("copy_bytes_sent", 0),
        downloads=tuple(each.shown() for each in metrics.downloads[-DOWNLOADS_SHOWN_MAX:]),
    )
    return report, stage.get("n_tokens", 0)


def has_news(known: Announcement, newest: Announcement) -> bool:
    """Whether a node has announced anything but how fast it computes.  Pure.

    A download is announced by saying the same again.
    """
    if newest.sequence == known.sequence:
        return False
    before, now = (
        msgspec.structs.replace(
            each, sequence=0, issued_at_s=0, expires_at_s=0, capabilities=_without_pace(each)
        )
        for each in (known, newest)
    )
    return before != now or _pace(known) == _pace(newest)


def _pace(announcement: Announcement) -> tuple[int, object]:
    return announcement.capabilities.token_us, announcement.capabilities.round_trips_us


def _without_pace(announcement: Announcement) -> Capabilities:
    return msgspec.structs.replace(
        announcement.capabilities, token_us=0, round_trips_us=(), memory_available_mb=0
    )


def pause_s(
    newest: Announcement, asked: Announcement, report: Report | None, *, is_seen: bool
) -> float:
    """How long after one question to a node the next one is due.  Pure.

    `asked` is what it had announced when it was asked.
    """
    if has_news(asked, newest):
        return NEWS_PAUSE_S if is_seen else NEWS_PAUSE_UNSEEN_S
    if not is_seen:
        return ASK_INTERVAL_UNSEEN_S
    moves = report is not None and (report.is_downloading or report.shard_state == "loading")
    return ASK_INTERVAL_MOVING_S if moves else ASK_INTERVAL_S


class _Question(NamedTuple):
    """The last question to a node."""

    at_s: float
    announcement: Announcement  # what it had said then


class NodeReports:
    """The newest report of each node by peer id, in `reports`; kept fresh by `run`."""

    def __init__(
        self,
        host: Host,
        directory: Directory,
        *,
        is_seen: Callable[[], bool],
        on_change: Callable[[], None],
        link_trips_ms: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """`link_trips_ms` are the round trips of links by peer id, where there are links: asking a
        node takes its control process and a new stream, and so several times as long."""
        self._link_trips_ms = link_trips_ms
        self.reports: dict[str, Report] = {}
        self._host = host
        self._directory = directory
        self._is_seen = is_seen
        self._on_change = on_change
        self._asked: dict[str, _Question] = {}
        self._rates: dict[str, RateMeter] = {}
        self._trips: dict[str, TripMeter] = {}
        self._waiting: set[str] = set()
        self._touched = trio.Event()

    def touch(self) -> None:
        """Somebody looks on, or a node has news: another one's turn may have come."""
        self._touched.set()

    async def run(self) -> None:
        """Asks the nodes in turn, first those with news, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_directory)
            while True:
                self._touched = trio.Event()
                due, due_s = self._next_due()
                if due is None or due_s > trio.current_time():
                    with trio.move_on_at(due_s):
                        await self._touched.wait()
                    continue
                if len(self._waiting) < QUESTIONS_WAITING_MAX:
                    self._asked[due.peer_id] = _Question(trio.current_time(), due)
                    self._waiting.add(due.peer_id)
                    # Whoever comes back has other addresses than before.
                    self._host.learn(due.peer_id, due.addresses)
                    nursery.start_soon(self.ask, due.peer_id)
                await trio.sleep(1 / QUESTIONS_PER_S_MAX)

    async def ask(self, peer_id: str) -> None:
        """Asks one node; its report is new then, whatever came of it."""
        started_s = time.monotonic()
        try:
            data = await get_metrics(self._host, peer_id, ASK_TIMEOUT_S)
            now_s = time.monotonic()
            trip_ms = self._trips.setdefault(peer_id, TripMeter()).note((now_s - started_s) * 1e3)
            report, n_tokens = report_of(data, self._link_trips_ms().get(peer_id, trip_ms))
            tokens_per_s = self._rates.setdefault(peer_id, RateMeter()).note(now_s, n_tokens)
            report = dataclasses.replace(report, tokens_per_s=tokens_per_s)
        except ShardmeshError as error:
            report = Report(answered=False, error=str(error))
        finally:
            self._waiting.discard(peer_id)
        self.reports[peer_id] = report
        self._on_change()
        self.touch()

    async def _follow_directory(self) -> None:
        version = self._directory.version
        while True:
            version = await self._directory.wait_changed(version)
            self.touch()

    def _next_due(self) -> tuple[Announcement | None, float]:
        """The node whose turn comes next, and when; forgets those gone."""
        announced = {each.peer_id: each for each in self._directory.all()}
        for known in (self.reports, self._asked, self._rates, self._trips):
            for peer_id in known.keys() - announced.keys():
                del known[peer_id]
        is_seen = self._is_seen()

        def due_s(peer_id: str) -> float:
            asked = self._asked.get(peer_id)
            if asked is None:
                return -math.inf
            report = self.reports.get(peer_id)
            return asked.at_s + pause_s(
                announced[peer_id], asked.announcement, report, is_seen=is_seen
            )

        first = min(announced.keys() - self._waiting, key=due_s, default=None)
        return (announced[first], due_s(first)) if first is not None else (None, math.inf)
