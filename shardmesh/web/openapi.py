"""The document at `/openapi.json`: what FastAPI makes of the routes, with our errors in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_HIDDEN_STATUS = "422"
"""FastAPI's own for a request that breaks the schema; here it is 400."""


def documented(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """A function for `app.openapi`; the document is made once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _correct(document)
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def _correct(document: dict[str, Any]) -> None:
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop(_HIDDEN_STATUS, None)
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"token": []}]  # a gateway may do without tokens
