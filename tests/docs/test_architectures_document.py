"""docs/architectures.md says what the table says."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_is_what_the_table_gives() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_architectures_doc.py"))
    text = (ROOT / "docs" / "architectures.md").read_text()
    assert text == script["document"](), "run `make docs/architectures.md`"
