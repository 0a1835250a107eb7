"""What tests in a browser have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

WAIT_MS = 20_000
"""For something to appear; only a slow machine needs more than moments."""

OpenPage = Callable[..., "Page"]


def wait_until(page: Page, expression: str) -> None:
    """Waits until a JavaScript expression is true; Playwright's own way needs eval in the page."""
    deadline_s = time.monotonic() + WAIT_MS / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline_s, expression
        page.wait_for_timeout(20)
