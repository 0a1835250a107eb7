"""`make faults`: runs the tests of the fault table, prints it and writes build/faults.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from faults.table import ROWS, Row

TESTS_DIR = Path(__file__).resolve().parents[1]
JSON_FILE = TESTS_DIR.parent / "build" / "faults.json"


@dataclasses.dataclass
class Result:
    """What became of the tests of a row."""

    outcomes: Counter[str] = dataclasses.field(default_factory=Counter)
    measured: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        return set(self.outcomes) == {"passed"}

    @property
    def sentence(self) -> str:
        counted = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items()))
        return "; ".join([*self.measured, f"{counted or 'no'} tests"])


class Collector:
    """A pytest plugin that notes outcomes and figures by row."""

    def __init__(self) -> None:
        self.results = {row.fault: Result() for row in ROWS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        for row in ROWS:
            if is_of_row(row, report.nodeid):
                result = self.results[row.fault]
                result.outcomes[report.outcome] += 1
                result.measured += [str(v) for k, v in report.user_properties if k == "measured"]
                if report.skipped and isinstance(report.longrepr, tuple):
                    result.measured.append(report.longrepr[2].removeprefix("Skipped: "))


def is_of_row(row: Row, node_id: str) -> bool:
    below = node_id.removeprefix("tests/")
    return any(below == t or below.startswith((f"{t}[", f"{t}::")) for t in row.tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-k", dest="only", default="", help="rows with this in their name")
    options = parser.parse_args()
    os.environ["SHARDMESH_FAULTS"] = "full"
    rows = [row for row in ROWS if options.only in row.fault]
    if not rows:
        parser.error(f"no row has {options.only!r} in its name")  # pytest would run everything
    os.chdir(TESTS_DIR.parent)
    tests = sorted({f"tests/{test}" for row in rows for test in row.tests})
    collector = Collector()
    pytest.main(["-q", "--timeout=900", *tests], plugins=[collector])
    entries = [entry_of(row, collector.results[row.fault]) for row in rows]
    JSON_FILE.parent.mkdir(exist_ok=True)
    JSON_FILE.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    print("\n| fault | target | measured | ok |\n|---|---|---|---|")
    for entry in entries:
        print(f"| {entry['fault']} | {entry['target']} | {entry['measured']} | {entry['ok']} |")
    return 0 if all(entry["ok"] for entry in entries) else 1


def entry_of(row: Row, result: Result) -> dict[str, str | bool]:
    return {
        "fault": row.fault,
        "target": row.target,
        "measured": result.sentence,
        "ok": result.is_ok,
    }


if __name__ == "__main__":
    sys.exit(main())
