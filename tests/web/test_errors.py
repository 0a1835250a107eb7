"""What a program is told that sends what the gateway cannot read."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from shardmesh.web.errors import handle_errors
from shardmesh.web.requests import ChatBody, CompletionBody


@pytest.fixture(scope="module")
def client() -> TestClient:
    """Routes that take the bodies of the real ones, and do nothing."""
    app = FastAPI()
    handle_errors(app)

    @app.post("/completions")
    def complete(body: CompletionBody) -> None: ...

    @app.post("/chat")
    def chat(body: ChatBody) -> None: ...

    return TestClient(app)


def refusal(client: TestClient, path: str, body: bytes) -> dict[str, Any]:
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"prompt": ', "at character 11"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_what_is_no_json_is_called_so(client: TestClient, body: bytes, place: str) -> None:
    error = refusal(client, "/completions", body)
    assert (error["code"], error["param"]) == ("BAD_JSON", "body")
    assert error["message"].startswith("the body is not valid JSON")
    assert place in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        (
            "/completions",
            b'{"prompt": {}}',
            "prompt",
            "prompt: Input should be a valid string or a valid list",
        ),
        (
            "/completions",
            b'{"prompt": [-1]}',
            "prompt.0",
            "prompt.0: Input should be greater than or equal to 0 or a valid string"
            " or a valid list",
        ),
        (
            "/completions",
            b'{"prompt": "x", "stop": 5, "n": "two"}',
            "stop",
            "stop: Input should be a valid string or a valid list; "
            "n: Input should be a valid integer",
        ),
        (
            "/chat",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "messages.0.content.0.type",
            "messages.0.content.0.type: Input should be 'text'; "
            "messages.0.content.0.text: Field required",
        ),
        ("/completions", b"[]", "body", None),
    ],
)
def test_a_fault_is_named_by_its_field(
    client: TestClient, path: str, body: bytes, param: str, message: str | None
) -> None:
    error = refusal(client, path, body)
    assert (error["code"], error["param"]) == ("BAD_INPUT", param)
    assert message in (None, error["message"])
