"""Events that last: what happened in the mesh, in SQLite, bounded.

The database is used by one thread at a time, never by the trio loop.  It holds no prompt and no
text of a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import re
import sqlite3
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from shardmesh.errors import StorageError
from shardmesh.web.events import Event
from shardmesh.wire.codec import encode_json

logger = logging.getLogger(__name__)

EVENTS_MAX: Final = 20_000
"""Events kept, about 4 MB; a mesh of 200 nodes that restart daily fills it in seven weeks."""

EVENTS_ASKED_MAX: Final = 500
"""Events of one answer."""

CAUSE_LETTERS_MAX: Final = 1000
DATA_LETTERS_MAX: Final = 4000
BUSY_TIMEOUT_S: Final = 5.0
"""For another process that has the same file open."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS event (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at_s REAL NOT NULL,
    kind TEXT NOT NULL,
    cause TEXT NOT NULL,
    data TEXT NOT NULL
) STRICT;
"""
_COLUMNS: Final = "id, at_s, kind, cause, data"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptEvent:
    """An event with the number that it has for ever."""

    id: int  # rises, over all runs of the gateway
    at_s: float  # wall-clock time, seconds since 1970
    kind: str
    cause: str
    data: dict[str, Any]


class EventStore:
    """Events of one gateway; made by `open_event_store`."""

    def __init__(self, connection: sqlite3.Connection, n_events_max: int = EVENTS_MAX) -> None:
        self._connection = connection
        self._n_events_max = n_events_max
        self._one_at_a_time = trio.CapacityLimiter(1)

    async def add(self, events: Sequence[Event]) -> list[KeptEvent]:
        """Keeps those that are lasting and numbers them; the oldest events make room.

        Raises StorageError (ours) if they cannot be written.
        """
        lasting = [event for event in events if event.is_lasting]
        return await self._in_thread(lambda: self._add(lasting)) if lasting else []

    async def recent(
        self, *, n_max: int = 100, before_id: int | None = None, kinds: Collection[str] = ()
    ) -> list[KeptEvent]:
        """The newest events first, older than an id if one is given.

        `kinds` are beginnings: `node` stands for all of `node.joined`, `node.left` and so on.
        """
        n_max = max(0, min(n_max, EVENTS_ASKED_MAX))
        return await self._in_thread(lambda: self._recent(n_max, before_id, tuple(kinds)))

    async def close(self) -> None:
        """Closes the file; nothing can be kept afterwards."""
        with trio.CancelScope(shield=True):
            await self._in_thread(self._connection.close)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        try:
            return await trio.to_thread.run_sync(work, limiter=self._one_at_a_time)
        except sqlite3.Error as error:
            raise StorageError(
                f"the events cannot be kept: {error}", next_step="make room on the disk"
            ) from error

    def _add(self, events: Sequence[Event]) -> list[KeptEvent]:
        kept = []
        with self._connection:
            for event in events:
                data = encode_json(event.data).decode()
                fields = (
                    event.at_s,
                    event.kind,
                    event.cause[:CAUSE_LETTERS_MAX],
                    data if len(data) <= DATA_LETTERS_MAX else "{}",
                )
                cursor = self._connection.execute(
                    "INSERT INTO event (at_s, kind, cause, data) VALUES (?, ?, ?, ?)", fields
                )
                kept.append(_event((cursor.lastrowid, *fields)))
            self._connection.execute(
                "DELETE FROM event WHERE id <= (SELECT max(id) FROM event) - ?",
                (self._n_events_max,),
            )
        return kept

    def _recent(self, n_max: int, before_id: int | None, kinds: tuple[str, ...]) -> list[KeptEvent]:
        where, values = ["1"], list[object]()
        if before_id is not None:
            where.append("id < ?")
            values.append(before_id)
        if kinds:
            where.append(f"({' OR '.join(['kind GLOB ?'] * len(kinds))})")
            values += [f"{re.sub(r'[^a-z._]', '', kind)}*" for kind in kinds]
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM event WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?",
            (*values, n_max),
        )
        return [_event(row) for row in rows]


def _event(row: Sequence[Any]) -> KeptEvent:
    number, at_s, kind, cause, data = row
    return KeptEvent(id=number, at_s=at_s, kind=kind, cause=cause, data=json.loads(data))


async def open_event_store(path: Path | None, *, n_events_max: int = EVENTS_MAX) -> EventStore:
    """The events in this file, None for memory only.

    A file that is no such database is put aside under another name.  Raises StorageError (ours)
    if none can be made.
    """

    def connect() -> sqlite3.Connection:
        if path is None:
            return _connect(":memory:")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _connect(str(path))
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            aside = path.with_name(path.name + ".broken")
            logger.warning("%s holds no events (%s); it is now %s", path, error, aside.name)
            path.replace(aside)
            return _connect(str(path))

    try:
        return EventStore(await trio.to_thread.run_sync(connect), n_events_max)
    except (sqlite3.Error, OSError) as error:
        raise StorageError(
            f"{path} cannot be opened: {error}", next_step="give another --state-dir"
        ) from error


def _connect(name: str) -> sqlite3.Connection:
    connection = sqlite3.connect(name, timeout=BUSY_TIMEOUT_S, check_same_thread=False)
    try:
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute("PRAGMA journal_mode = WAL")
            cursor.execute("PRAGMA synchronous = NORMAL")
            cursor.execute(_SCHEMA)
            cursor.execute(f"SELECT {_COLUMNS} FROM event LIMIT 1").fetchall()
    except sqlite3.Error:
        connection.close()
        raise
    return connection
