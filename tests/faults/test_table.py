"""The fault table names tests that exist."""

from __future__ import annotations

import pytest
from faults.__main__ import TESTS_DIR, is_of_row
from faults.table import ROWS, Row


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)
def test_every_row_is_proven_by_tests_that_exist(row: Row) -> None:
    assert row.target
    for test in row.tests:
        file, _, name = test.partition("::")
        text = (TESTS_DIR / file).read_text(encoding="utf-8")
        assert f"def {name or 'test_'}" in text, test


def test_a_row_takes_its_own_tests_only() -> None:
    row = Row("x", "y", ("a/test_a.py::test_one", "b/test_b.py"))
    assert is_of_row(row, "tests/a/test_a.py::test_one[3]")
    assert is_of_row(row, "tests/b/test_b.py::test_any")
    assert not is_of_row(row, "tests/a/test_a.py::test_one_more")
