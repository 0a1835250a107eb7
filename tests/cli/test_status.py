"""What `shardmesh status` shows of names that others chose."""

from __future__ import annotations

import pytest

from shardmesh.cli.status import show_models
from shardmesh.coordinator.overview import ModelView


@pytest.mark.parametrize("name", ["Chat [/INST]", "[bold]tiny", "[link=http://x]y"])
def test_brackets_in_a_name_are_nothing_but_brackets(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_models((ModelView(name, "0" * 64, 4, 2, (), ((0, 4),)),))
    assert name in capsys.readouterr().out
