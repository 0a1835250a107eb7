"""Debian's Chromium on the console; without it, or without Playwright, these tests are skipped."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from support.console_server import ConsoleServer, console_server
from support.pages import WAIT_MS, OpenPage

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
FLAGS = (
    # As root in a container Chromium's own sandbox cannot run; these tests only visit loopback.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Playwright's own start
        started = playwright.sync_playwright().start()
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
    yield chromium
    chromium.close()
    started.stop()


@pytest.fixture
def server() -> Iterator[ConsoleServer]:
    with console_server() as running:
        yield running


@pytest.fixture
def four(server: ConsoleServer) -> ConsoleServer:
    """Four nodes, one for each shard."""
    server.call(lambda mesh: mesh.add(0, 1, 2, 3))
    return server


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens the page of a server; whatever its scripts complain of fails the test."""
    contexts: list[Any] = []
    complaints: list[str] = []

    def open_one(
        url: str,
        *,
        width: int = 1440,
        height: int = 900,
        scheme: str = "light",
        expected: str = "",
        **options: Any,
    ) -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: complaints.append(said.text) if _is_complaint(said, expected) else None,
        )
        page.goto(url)
        page.wait_for_selector("#live[data-state=live]")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert complaints == []


def _is_complaint(said: Any, expected: str) -> bool:
    """Refused connections and error statuses are what some tests are about."""
    passed = (
        "net::ERR_",
        "WebSocket",
        "Failed to load resource",
        *([expected] if expected else []),
    )
    return said.type in ("error", "warning") and not any(word in said.text for word in passed)
