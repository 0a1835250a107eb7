"""What the files with routes have in common."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from fastapi.requests import HTTPConnection

from shardmesh.web.gateway import Gateway


def _gateway_of_app(connection: HTTPConnection) -> Gateway:
    gateway: Gateway = connection.app.state.gateway
    return gateway


GatewayOfApp = Annotated[Gateway, Depends(_gateway_of_app)]
"""The type of a route's parameter that is to be the app's gateway; WebSocket routes too."""
