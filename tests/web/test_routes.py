"""What holds for every route of the gateway."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import cast

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, APIWebSocketRoute

from shardmesh.web.app import create_app
from shardmesh.web.gateway import Gateway
from shardmesh.web.rights import is_public, right_needed


def routes_below(routes: Sequence[object]) -> Iterator[APIRoute | APIWebSocketRoute]:
    """Also those of included routers, which newer versions of FastAPI keep apart."""
    for route in routes:
        if isinstance(route, APIRoute | APIWebSocketRoute):
            yield route
        elif (router := getattr(route, "original_router", None)) is not None:
            yield from routes_below(router.routes)


ROUTES = list(routes_below(create_app(cast(Gateway, SimpleNamespace(node=None))).routes))
INFERENCE = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/apply-template",
}
OPERATE = {"/v1/nodes/{peer_id}/shard"}
ANY_TOKEN = {"/v1/models", "/v1/models/{model_id:path}"}


def test_no_route_is_overlooked() -> None:
    assert {route.path for route in ROUTES} > INFERENCE | OPERATE | ANY_TOKEN | {"/ws", "/health"}


def dependants(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for inner in dependant.dependencies:
        yield from dependants(inner)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_nothing_of_a_route_is_called_in_a_thread(route: APIRoute | APIWebSocketRoute) -> None:
    """FastAPI does that with plain functions, and it takes longer than what they do."""
    for each in dependants(route.dependant):
        assert each.call is not None
        assert inspect.iscoroutinefunction(each.call), each.call


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_the_right_that_a_route_needs(route: APIRoute | APIWebSocketRoute) -> None:
    methods = (route.methods or ()) if isinstance(route, APIRoute) else {"GET"}
    for method in methods:
        found = "public" if is_public(route.path) else right_needed(method, route.path)
        if route.path in INFERENCE | OPERATE:
            assert found == ("inference" if route.path in INFERENCE else "operate")
        elif route.path in ANY_TOKEN:
            assert found is None
        else:
            assert found in ("public", "read")
            assert method == "GET"
