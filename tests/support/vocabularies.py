"""Files that hold a vocabulary and no weights, with any chat template."""

from __future__ import annotations

import struct
from pathlib import Path

from support.models import tokenizer_metadata, write_gguf

_STRING = 8


def text_value(text: str) -> bytes:
    """An encoded GGUF metadata value."""
    data = text.encode()
    return struct.pack("<IQ", _STRING, len(data)) + data


def write_vocabulary(path: Path, vocabulary: str, chat_template: str | None = None) -> Path:
    """Writes a GGUF file without tensors and returns `path`; see `models.write_model`."""
    values = {"general.architecture": text_value("llama"), **tokenizer_metadata(vocabulary)[0]}
    if chat_template is not None:
        values["tokenizer.chat_template"] = text_value(chat_template)
    write_gguf(path, values, [])
    return path
