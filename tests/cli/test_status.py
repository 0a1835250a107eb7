"""What `shardmesh status` shows of names that others chose."""

from __future__ import annotations

import pytest

from shardmesh.cli.status import NARROW_COLUMNS, show_models
from shardmesh.coordinator.overview import ModelView, ReplicaView


@pytest.mark.parametrize("name", ["Chat [/INST]", "[bold]tiny", "[link=http://x]y"])
def test_brackets_in_a_name_are_nothing_but_brackets(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_models((ModelView(name, "0" * 64, 4, 2, (), ((0, 4),)),))
    assert name in capsys.readouterr().out


def view(n_replicas: int) -> ModelView:
    replicas = tuple(
        ReplicaView(
            peer_id=f"12D3KooW{n:044d}",
            shard_id=n,
            layer_start=n * 8,
            layer_end=n * 8 + 8,
            state="fetching",
            n_ctx=131072,
            memory_mb=196608,
            memory_available_mb=131072,
            fingerprint="",
            path="relayed",
            round_trip_ms=1234.5,
            links=(),
            addresses=(),
        )
        for n in range(n_replicas)
    )
    return ModelView("tale", "0" * 64, n_replicas * 8, n_replicas, replicas, ())


def lines(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    show_models((view(12),))
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_replica_is_a_line_and_nothing_of_it_is_cut_off(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = lines(width, capsys, monkeypatch)
    assert "…" not in shown
    rows = [line for line in shown.splitlines() if " fetching " in line]
    assert len(rows) == 12
    assert all(f"{n:08d}" in row and f"[{8 * n}, {8 * n + 8})" in row for n, row in enumerate(rows))
    assert all(("128.0/192.0" in row) == (width >= NARROW_COLUMNS) for row in rows)
