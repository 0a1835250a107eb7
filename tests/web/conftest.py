"""One demo mesh with its gateway, which all tests that only use it share."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from support.processes import workspace
from support.templated import write_templated

START_TIMEOUT_S = 120.0
TIMEOUT_S = 60.0


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """Where the gateway answers, such as http://127.0.0.1:41234; its model knows tools."""
    with workspace() as space:
        model = write_templated(space.folder / "tools.gguf")
        options = ("--shards", "2", "--max-tokens", "4", "--web", "--port", "0")
        started = space.start("demo", "--model", str(model), *options)
        yield started.wait_line(r"base_url=(http://\S+)/v1", START_TIMEOUT_S)[1]


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own package, told of nothing but the address."""
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", timeout=TIMEOUT_S, max_retries=0
    ) as client:
        yield client
