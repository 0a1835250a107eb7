"""Audits of a coordinator: a share of its sessions, one at a time, behind its other work."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from shardmesh.coordinator.audit import (
    AuditReport,
    Results,
    Transcript,
    audit,
    auditable,
    choose,
    recompute,
)
from shardmesh.coordinator.chain import Chain, Replica
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.session import Session
from shardmesh.errors import InputError, ShardmeshError

logger = logging.getLogger(__name__)

AUDIT_TIMEOUT_S = 300.0
"""For all passes of one audit; a stage that takes longer is not audited."""


class OpenSession(Protocol):
    """A session over a chain whose links are brought up first; no stage of it is replaced."""

    def __call__(
        self, chain: Chain, settings: SessionSettings
    ) -> AbstractAsyncContextManager[Session]: ...


class Auditor:
    """Audits a share of the sessions that it is told of."""

    def __init__(
        self,
        rate: float,
        nursery: trio.Nursery,
        *,
        open_session: OpenSession,
        distrust: Callable[[str], None],
    ) -> None:
        """`rate` is the share of sessions, 0 to 1; raises InputError (theirs) for another one.

        `distrust` keeps a node out from then on.
        """
        if not 0 <= rate <= 1:
            raise InputError(f"the share of audited sessions is 0 to 1, not {rate}")
        self.n_skipped = 0
        """Sessions that were to be audited and were not: no other replica, or no room."""
        self._rate = rate
        self._nursery = nursery
        self._open_session = open_session
        self._distrust = distrust
        self._tell: list[Callable[[AuditReport], None]] = []
        self._idle = trio.Event()
        self._idle.set()

    def tell(self, on_report: Callable[[AuditReport], None]) -> None:
        """Calls this with every report from now on; it must be quick."""
        self._tell.append(on_report)

    async def wait_idle(self) -> None:
        """Returns when no audit is under way."""
        await self._idle.wait()

    def is_due(self) -> bool:
        """Whether the session that begins now is one of those to audit."""
        return random.SystemRandom().random() < self._rate

    def start(self, transcript: Transcript, allowed: Sequence[Replica]) -> None:
        """Audits a session that is over with replicas that it may use; returns at once."""
        candidates = auditable(transcript.chain, allowed, transcript.settings.n_ctx)
        if not candidates or not self._idle.is_set():
            self.n_skipped += 1
            return
        self._idle = trio.Event()
        self._nursery.start_soon(self._run, transcript, *choose(candidates))

    async def _run(self, transcript: Transcript, number: int, others: Sequence[Replica]) -> None:
        # From the beginning: what a stage has kept of other sessions has no part in it.
        fresh = dataclasses.replace(transcript.settings, prefix=None)

        async def replay(chain: Chain) -> Results:
            async with self._open_session(chain, fresh) as session:
                return await recompute(session, transcript)

        try:
            with trio.fail_after(AUDIT_TIMEOUT_S):
                report = await audit(transcript, number, others, replay)
        except (ShardmeshError, trio.TooSlowError) as error:
            self.n_skipped += 1
            logger.info("an audit came to nothing: %s", error)
        else:
            self._report(report)
        finally:
            self._idle.set()

    def _report(self, report: AuditReport) -> None:
        if report.outcome == "same":
            logger.debug("audit: %s", report.sentence)
        else:
            logger.warning("audit: %s", report.sentence)
        if report.outcome == "differs":
            for peer_id in report.suspects:
                self._distrust(peer_id)
        for on_report in self._tell:
            on_report(report)
