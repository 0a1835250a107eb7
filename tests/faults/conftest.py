"""The fortress that all tests here share, and what they have measured for the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.fortress import IS_FULL, Fortress, built_fortress
from support.models import write_model

from shardmesh.demo_model import DEMO_MODEL

Measured = Callable[[str], None]


@pytest.fixture(scope="session")
def fortress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fortress]:
    model = DEMO_MODEL
    if not model.exists():
        model = write_model(tmp_path_factory.mktemp("model") / "synthetic.gguf", n_layer=8)
    with built_fortress(Path(model)) as built:
        yield built


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Measured:
    """Notes a figure with its unit for the table of `make faults`."""
    return lambda sentence: record_property("measured", sentence)


@pytest.fixture(autouse=True)
def _only_what_is_asked_for(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("faults") and not IS_FULL:
        pytest.skip("part of `make faults`")
