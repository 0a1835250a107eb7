"""What the files with routes have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from fastapi import Depends
from fastapi.requests import HTTPConnection

from shardmesh.web.gateway import Gateway


async def _gateway_of_app(connection: HTTPConnection) -> Gateway:
    # Not a plain function: FastAPI would call that in a thread, which takes longer than the rest.
    gateway: Gateway = connection.app.state.gateway
    return gateway


GatewayOfApp = Annotated[Gateway, Depends(_gateway_of_app)]
"""The type of a route's parameter that is to be the app's gateway; WebSocket routes too."""


async def _caller(connection: HTTPConnection) -> str:
    caller: str = connection.state.caller
    return caller


CallerOfRequest = Annotated[str, Depends(_caller)]
"""The type of a route's parameter that is to be the name of the API token of whoever asks."""


def ranges_json(ranges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Layer ranges as JSON has them; a schema of pairs is not understood everywhere."""
    return [list(each) for each in ranges]
