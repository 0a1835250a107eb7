"""One demo mesh with its gateway, which all tests that only use it share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.processes import workspace

START_TIMEOUT_S = 120.0


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Where the gateway answers, such as http://127.0.0.1:41234."""
    with workspace() as space:
        started = space.start("demo", "--shards", "2", "--max-tokens", "4", "--web", "--port", "0")
        yield started.wait_line(r"base_url=(http://\S+)/v1", START_TIMEOUT_S)[1]
