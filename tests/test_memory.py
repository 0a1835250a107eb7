"""How much memory there is, in a container with a limit and without."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from shardmesh import memory

GIB = 2**30


class Groups:
    """A made-up tree of control groups."""

    def __init__(self, folder: Path, own: str) -> None:
        self.folder = folder
        self.own = folder / "own"
        self.own.write_text(own)

    def write(self, path: str, **values: object) -> None:
        group = self.folder / path
        group.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (group / name.replace("__", ".")).write_text(f"{value}\n")

    def limits(self) -> list[tuple[int, int]]:
        return list(memory._limits(self.folder, self.own))


def test_the_limit_of_a_container(tmp_path: Path) -> None:
    groups = Groups(tmp_path, "0::/\n")
    groups.write(
        "",
        memory__max=4 * GIB,
        memory__current=3 * GIB,
        memory__stat=f"anon 5\ninactive_file {GIB}\nactive_file 7",
    )
    assert groups.limits() == [(4 * GIB, 2 * GIB)]


def test_each_group_around_may_have_a_limit(tmp_path: Path) -> None:
    groups = Groups(tmp_path, "0::/service/worker\n")
    groups.write("", memory__max="max", memory__current=9)
    groups.write("service", memory__max=3 * GIB, memory__current=GIB)
    groups.write("service/worker", memory__max=2 * GIB, memory__current=5)
    assert groups.limits() == [(2 * GIB, 5), (3 * GIB, GIB)]


def test_groups_of_version_1_whose_names_are_those_outside(tmp_path: Path) -> None:
    groups = Groups(tmp_path, "5:cpu:/docker/abc\n4:memory:/docker/abc\n0::/\n")
    groups.write(
        "memory",
        memory__limit_in_bytes=GIB,
        memory__usage_in_bytes=600,
        memory__stat="total_inactive_file 200",
    )
    assert groups.limits() == [(GIB, 400)]


@pytest.mark.parametrize("own", ["", "nonsense", "0::/../../etc\n", "0::\n", "\0"])
def test_no_limit_where_nothing_is_known(tmp_path: Path, own: str) -> None:
    assert Groups(tmp_path, own).limits() == []


def test_the_least_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups(tmp_path, "0::/\n")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", groups.own)
    assert memory.memory_bytes() == psutil.virtual_memory().total
    groups.write("", memory__max=1000, memory__current=1200)
    assert memory.memory_bytes() == 1000
    assert memory.memory_free_bytes() == 0
