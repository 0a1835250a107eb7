"""The demo model: a small llama that writes fairy tales, part of the package."""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL = Path(__file__).parent / "fairy-tales.gguf"
