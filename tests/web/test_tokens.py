from __future__ import annotations

from pathlib import Path

import pytest

from shardmesh.errors import InputError
from shardmesh.web.errors import RateLimitError
from shardmesh.web.tokens import ANYBODY, RIGHTS, ApiTokens, Caller, RateLimits, read_tokens


@pytest.mark.parametrize("line", ["short", "name:short", "with blank in it, though long", "é" * 20])
def test_what_is_no_token_is_refused(line: str) -> None:
    with pytest.raises(InputError) as caught:
        ApiTokens([line])
    assert caught.value.code == "BAD_API_TOKEN"
    assert line not in str(caught.value), "a token is not repeated"


def test_a_file_of_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# ours\n\nalice:{'a' * 20}\n{'b' * 20}\n")
    path.chmod(0o600)
    tokens = ApiTokens(read_tokens(path))
    assert tokens.caller("a" * 20) == Caller("alice", RIGHTS)
    assert tokens.caller("b" * 20) == Caller("token 2", RIGHTS)
    assert tokens.caller("a" * 19) is None
    path.chmod(0o644)
    with pytest.raises(InputError, match="read by others"):
        read_tokens(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.touch(0o600)
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read: [^:]+$") as caught:
        read_tokens(path)
    assert caught.value.next_step


def test_a_token_may_have_some_rights_only() -> None:
    tokens = ApiTokens([f"grafana/read:{'a' * 20}", f"bot/inference,read:{'b' * 20}"])
    assert tokens.caller("a" * 20) == Caller("grafana", frozenset({"read"}))
    assert tokens.caller("b" * 20) == Caller("bot", frozenset({"inference", "read"}))
    for line in (f"x/all:{'a' * 20}", f"x/:{'a' * 20}", f"x/read,:{'a' * 20}"):
        with pytest.raises(InputError):
            ApiTokens([line])


def test_without_tokens_anybody_may_do_all() -> None:
    assert ApiTokens().caller("") is ANYBODY
    assert ANYBODY.rights == RIGHTS


def test_a_bucket_fills_again() -> None:
    limits = RateLimits(60)
    for _ in range(60):
        limits.take("alice", 0.0)
    with pytest.raises(RateLimitError) as caught:
        limits.take("alice", 0.5)
    assert caught.value.retry_s == pytest.approx(0.5)
    limits.take("alice", 1.0)
