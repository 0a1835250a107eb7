"""docs/protocol.md and docs/operations.md name every message, field, limit and error code."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

import shardmesh
from shardmesh.wire import (
    announcement,
    cluster_update,
    commands,
    limits,
    link_agreement,
    messages,
    model_info,
    relay,
    torrent_messages,
)

PACKAGE = Path(shardmesh.__file__).parent
DOCS = Path(__file__).resolve().parents[2] / "docs"
PROTOCOL = (DOCS / "protocol.md").read_text(encoding="utf-8")
OPERATIONS = (DOCS / "operations.md").read_text(encoding="utf-8")
MODULES = (
    announcement,
    cluster_update,
    commands,
    link_agreement,
    messages,
    model_info,
    relay,
    torrent_messages,
)
UNITS = {"KIB", "MIB"}
UNITS_BYTES = {"TiB": 2**40, "GiB": 2**30, "MiB": limits.MIB, "KiB": limits.KIB}
ERROR_MAKERS = {"refuse", "_refuse"}  # shards' helpers: the code is their last argument


def structs_of(module: ModuleType) -> Iterator[type[msgspec.Struct]]:
    """The messages that a module defines, without those that only it knows."""
    for name, value in inspect.getmembers(module, inspect.isclass):
        is_own = value.__module__ == module.__name__ and not name.startswith("_")
        if is_own and issubclass(value, msgspec.Struct):
            yield value


STRUCTS = [struct for module in MODULES for struct in structs_of(module)]
LIMITS = {name: value for name, value in vars(limits).items() if re.fullmatch(r"[A-Z_]+", name)}


def cell_of(name: str, value: float) -> str:
    """How the table of limits writes a value."""
    if "_BYTES" in name:
        for unit, size in UNITS_BYTES.items():
            if value % size == 0:
                return f"{value // size:,} {unit}"
        return f"{value:,} B"
    return f"{value:g} s" if name.endswith("_S") else f"{value:,}"


def error_codes_of(source: str) -> Iterator[str]:
    """Every error code in a module: `code=` of a call, and the default codes of the classes."""
    tree = ast.parse(source)
    constants: dict[str, object] = {}
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=value))
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.Constant(value=value))
            ):
                constants[name] = value
    for part in ast.walk(tree):
        match part:
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[*_, last]) if (
                name in ERROR_MAKERS
            ):
                candidates: list[ast.expr] = [last]
            case ast.Call():
                candidates = [word.value for word in part.keywords if word.arg == "code"]
            case (
                ast.Assign(targets=[ast.Name(id="default_code")], value=default)
                | ast.AnnAssign(target=ast.Name(id="default_code"), value=ast.expr() as default)
            ):
                candidates = [default]
            case _:
                continue
        for candidate in candidates:
            code = constants.get(getattr(candidate, "id", ""), getattr(candidate, "value", None))
            if isinstance(code, str):
                yield code


def all_error_codes() -> set[str]:
    sources = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    return {code for source in sources for code in error_codes_of(source)}


def test_the_modules_have_messages_limits_and_codes() -> None:
    assert {"OpenSession", "HiddenBatch", "Announcement", "LinkOffer"} <= {
        struct.__name__ for struct in STRUCTS
    }
    assert len(LIMITS) > 50
    assert {"BUSY", "GGUF_TENSOR", "CONTEXT_FULL", "NO_LINK"} <= all_error_codes()


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_message_is_described(struct: type[msgspec.Struct]) -> None:
    assert re.search(rf"\b{struct.__name__}\b", PROTOCOL), f"no word about {struct.__name__}"
    tag = struct.__struct_config__.tag
    if tag is not None:
        assert f"`{tag}`" in PROTOCOL, f"no word about the type {tag}"
    missing = [field for field in struct.__struct_fields__ if f"`{field}`" not in PROTOCOL]
    assert not missing, f"{struct.__name__} has fields that docs/protocol.md lacks: {missing}"


@pytest.mark.parametrize("name", sorted(LIMITS.keys() - UNITS))
def test_every_limit_is_listed_with_its_value(name: str) -> None:
    row = f"| `{name}` | {cell_of(name, LIMITS[name])} |"
    assert row in PROTOCOL, f"docs/protocol.md lacks a row that begins with: {row}"


def test_no_limit_is_listed_that_is_gone() -> None:
    listed = set(re.findall(r"^\| `([A-Z_]+)` \|", PROTOCOL, re.MULTILINE))
    assert {name for name in listed if name.endswith(("_MAX", "_S"))} <= LIMITS.keys()


def test_every_command_is_described() -> None:
    missing = [name for name in commands.PARAMS if f"`{name}`" not in PROTOCOL]
    assert not missing


@pytest.mark.parametrize(
    "protocol",
    [
        announcement.DIRECTORY_NEWS_PROTOCOL,
        announcement.DIRECTORY_PROTOCOL,
        cluster_update.CLUSTER_PROTOCOL,
        commands.JSON_PROTOCOL,
        commands.METRICS_PROTOCOL,
        link_agreement.LINK_PROTOCOL,
        link_agreement.LINK_STREAM_PROTOCOL,
        model_info.MODEL_INFO_PROTOCOL,
        relay.DIAL_BACK_PROTOCOL,
        relay.RELAY_PROTOCOL,
        relay.RELAYED_PROTOCOL,
        torrent_messages.TORRENT_PROTOCOL,
    ],
)
def test_every_protocol_has_a_chapter(protocol: str) -> None:
    assert f"\n## {protocol}\n" in PROTOCOL


@pytest.mark.parametrize("code", sorted(all_error_codes()))
def test_operations_says_what_to_do_about_every_error_code(code: str) -> None:
    assert f"`{code}`" in OPERATIONS, f"docs/operations.md does not say what to do about {code}"


def test_no_error_code_is_described_that_is_gone() -> None:
    table = PROTOCOL.partition("\n## Errors\n")[2].partition("\n## Limits\n")[0]
    described = set(re.findall(r"`([A-Z]{2,}(?:_[A-Z]+)*)`", table))
    assert described - commands.PARAMS.keys() <= all_error_codes()
