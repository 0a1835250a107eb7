"""The documents name files that exist, link to pages that exist, and list every setting."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from shardmesh.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CHANGELOG.md"]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
NOT_IN_FILES = {"config", "out_dir"}


def options() -> Iterator[tuple[str, click.Option]]:
    """Every option of every command, with the command's name."""
    for name in COMMANDS:
        command: click.Command = importlib.import_module(f"shardmesh.cli.{name}").command
        for param in command.params:
            if isinstance(param, click.Option):
                yield name, param


def with_variables() -> list[tuple[str, click.Option]]:
    return [(name, option) for name, option in options() if option.envvar]


def ids(value: object) -> str:
    return value.opts[0] if isinstance(value, click.Option) else str(value)


@pytest.mark.parametrize(("command", "option"), with_variables(), ids=ids)
def test_operations_lists_every_setting(command: str, option: click.Option) -> None:
    rows = [line for line in OPERATIONS.splitlines() if line.startswith("| `--")]
    row = next((row for row in rows if f"`{option.opts[0]}`" in row and command in row), None)
    assert row is not None, f"no row for {option.opts[0]} of {command}"
    assert f"`{option.envvar}`" in row
    assert option.name in NOT_IN_FILES or f"`{option.name}`" in row, "the key of the file"


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"`shardmesh {name}`" not in readme] == []


def test_commands_in_documents_have_only_flags_that_exist() -> None:
    known: dict[str, set[str]] = {name: {"--help"} for name in COMMANDS}
    for name, option in options():
        known[name] |= {*option.opts, *option.secondary_opts}
    wrong = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            for name, rest in re.findall(r"shardmesh ([a-z]+)((?: [^`#|]*)?)", line):
                if name in known:
                    flags = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest))
                    wrong += [f"{page.name}: {name} {flag}" for flag in flags - known[name]]
    assert wrong == []


def test_files_that_documents_name_exist() -> None:
    missing = []
    for page in PAGES:
        for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`", page.read_text("utf-8")):
            folders = (ROOT, ROOT / "shardmesh")
            is_code = name.endswith(".py") or (ROOT / "shardmesh" / name).is_dir()
            if is_code and not any((folder / name).exists() for folder in folders):
                missing.append(f"{page.name}: {name}")
    assert missing == []


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(#[^)\s]*)?\)", page.read_text("utf-8")):
            path = page.parent / target if target else page
            if not path.exists() or (anchor and anchor[1:] not in anchors_of(path)):
                broken.append(f"{page.name}: {target}{anchor}")
    assert broken == []


def anchors_of(page: Path) -> set[str]:
    """The anchors that a page's headings get: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
