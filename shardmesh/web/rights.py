"""Which right of an API token a request needs.  Pure."""

from __future__ import annotations

from typing import Final

PUBLIC_PATHS: Final = frozenset(
    {"/", "/health", "/docs", "/openapi.json", "/favicon.ico", "/favicon.svg"}
)
PUBLIC_FOLDERS: Final = ("/docs/", "/static/")
"""Served to anybody: pages and their parts, which hold no secret, and the health of the mesh."""

_INFERENCE: Final = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/tokenize",
        "/detokenize",
        "/apply-template",
    }
)
_MODELS: Final = "/v1/models"


def is_public(path: str) -> bool:
    """Whether no token is needed at all."""
    return path in PUBLIC_PATHS or path.startswith(PUBLIC_FOLDERS)


def right_needed(method: str, path: str) -> str | None:
    """The right for a request that is not public; None if any known token will do.

    Whatever changes something and is not inference is an operator's, be it known here or not.
    """
    if path in _INFERENCE:
        return "inference"
    if method not in ("GET", "HEAD", "OPTIONS"):
        return "operate"
    if path == _MODELS or path.startswith(f"{_MODELS}/"):
        return None
    return "read"
