"""What all tests share: their order, and the profile of `make fuzz`."""

from __future__ import annotations

import signal

import pytest
from hypothesis import HealthCheck, settings
from support.models import vocabulary_note

FUZZ_EXAMPLES = 20_000

# Whoever runs the tests in the background may have had SIGINT ignored, which the processes that
# tests start would inherit: Ctrl-C would do nothing to them.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "fuzz", max_examples=FUZZ_EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck)
)


def pytest_report_header() -> str:
    return vocabulary_note()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, so that a mistake shows early; inside each group the order stays."""
    items.sort(key=_slowness)


def _slowness(item: pytest.Item) -> int:
    if item.get_closest_marker("slow"):
        return 2
    return 1 if item.get_closest_marker("processes") else 0
