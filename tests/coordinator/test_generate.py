"""Text out of a mesh of fake engines: stop strings, ends, cut characters, cancellation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
import trio
from support.letters import Letters
from support.mesh import GREEDY, PIECE_TOKENS, MemoryMesh, memory_mesh

from shardmesh.coordinator.feed import Feed
from shardmesh.coordinator.generate import Finished, Piece, generate, prefill
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.session import Session
from shardmesh.coordinator.stops import StopScanner
from shardmesh.engine.base import MicroBatch, SamplingSettings
from shardmesh.engine.fake import FakeEngine, fake_chain, fake_info
from shardmesh.engine.text import TextDecoder
from shardmesh.errors import ProtocolError
from shardmesh.wire.limits import SCORED_TOKENS_MAX
from shardmesh.wire.messages import Sampled

SETTINGS = SessionSettings(n_ctx=200, sampling=GREEDY, piece_tokens=PIECE_TOKENS)
PROMPT = [3, 1, 4, 1, 5]


def expected_tokens(n_tokens: int) -> list[int]:
    """What one engine with all layers says after the prompt."""
    engine = FakeEngine(fake_info(n_batch_tokens_max=256))
    engine.open_sequence(0, SamplingSettings(temperature=0.0))
    tokens: list[int] = []
    position, given = 0, PROMPT
    for _ in range(n_tokens):
        micro = MicroBatch(sequence=0, position=position, tokens=tuple(given), sample=True)
        (output,) = engine.compute([micro])
        assert output.sampled is not None
        position += len(given)
        given = [output.sampled.token]
        tokens += given
    return tokens


def text_of(tokens: list[int]) -> str:
    return "".join(f"<{token}>" for token in tokens)


def items_of(
    session: Session,
    *,
    n_tokens_max: int = 12,
    source: Letters | None = None,
    stops: tuple[str, ...] = (),
    ignore_end: bool = False,
) -> AsyncGenerator[Piece | Finished, None]:
    return generate(
        session,
        PROMPT,
        n_tokens_max=n_tokens_max,
        source=source or Letters(),
        decoder=TextDecoder(),
        stops=StopScanner(stops),
        ignore_end=ignore_end,
    )


async def run(mesh: MemoryMesh, **how: object) -> tuple[str, list[int], Finished]:
    """All text, the tokens that came with it, and the end."""
    async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
        found = [item async for item in items_of(session, **how)]  # type: ignore[arg-type]
    *pieces, finished = found
    assert isinstance(finished, Finished)
    assert all(isinstance(piece, Piece) for piece in pieces)
    text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
    tokens = [p.token.token for p in pieces if isinstance(p, Piece) and p.token is not None]
    return text, tokens, finished


async def test_as_many_tokens_as_were_asked_for() -> None:
    async with memory_mesh(fake_chain((0, 1, 4))) as mesh:
        for n_tokens in (1, 2, 12):
            text, tokens, finished = await run(mesh, n_tokens_max=n_tokens)
            assert tokens == expected_tokens(n_tokens)
            assert text == text_of(tokens)
            assert (finished.reason, finished.timings.n_tokens) == ("length", n_tokens)
            assert finished.timings.n_prompt_tokens == len(PROMPT)


async def test_the_next_token_is_on_its_way_while_one_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But none behind the last."""
    async with memory_mesh(fake_chain((0, 1, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            sent: list[int] = []
            send = session.send

            def note(tokens: Sequence[int], **how: Any) -> None:
                sent.extend(tokens)
                send(tokens, **how)

            monkeypatch.setattr(session, "send", note)
            seen: list[int] = []
            async for item in items_of(session, n_tokens_max=5):
                if isinstance(item, Piece) and item.token is not None:
                    seen.append(item.token.token)
                    assert sent[len(PROMPT) :] == seen[:4]
            assert seen == expected_tokens(5)


async def test_the_end_token_ends_the_text_and_is_not_shown() -> None:
    expected = expected_tokens(12)
    end = next(token for i, token in enumerate(expected) if i >= 4 and token not in expected[:i])
    n_before = expected.index(end)
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        source = Letters(ends=frozenset([end]))
        text, tokens, finished = await run(mesh, source=source)
        assert tokens == expected[:n_before]
        assert text == text_of(tokens)
        assert finished.reason == "stop"
        text, _, finished = await run(mesh, source=source, ignore_end=True)
        assert text == text_of(expected)
        assert finished.reason == "length"


@pytest.mark.parametrize("cut", [0, 1, 3])
async def test_a_stop_string_over_several_tokens_is_not_shown(cut: int) -> None:
    expected = expected_tokens(12)
    whole = text_of(expected)
    stop = whole[whole.index(">", 8) - cut :][:6]  # begins inside a token, ends in another
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        text, _, finished = await run(mesh, stops=(stop, "never"))
    assert text == whole[: whole.index(stop)]
    assert finished.reason == "stop"


async def test_a_beginning_of_a_stop_string_is_shown_at_the_end() -> None:
    expected = expected_tokens(5)
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        text, _, finished = await run(mesh, n_tokens_max=5, stops=(text_of(expected)[-3:] + "x",))
    assert text == text_of(expected)
    assert finished.reason == "length"


async def test_a_character_cut_between_tokens_comes_whole() -> None:
    first, second, *_ = expected_tokens(4)
    assert first != second
    euro = "€".encode()
    source = Letters({first: euro[:2], second: euro[2:]})
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            items = [item async for item in items_of(session, n_tokens_max=2, source=source)]
        assert [item.text for item in items if isinstance(item, Piece)] == ["", "€", ""]
        text, _, _ = await run(mesh, n_tokens_max=1, source=source)
        assert text == "\ufffd"  # never completed


async def is_free(mesh: MemoryMesh) -> None:
    while any(stage.n_sessions for stage in mesh.stages):
        await trio.lowlevel.checkpoint()


async def test_a_cancellation_in_the_middle_frees_all_stages() -> None:
    async with memory_mesh(fake_chain((0, 1, 2, 4))) as mesh:
        with trio.CancelScope() as scope:
            async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
                async with aclosing(items_of(session)) as items:
                    n_seen = 0
                    async for _ in items:
                        n_seen += 1
                        if n_seen == 3:
                            scope.cancel()
        assert scope.cancelled_caught
        await is_free(mesh)
        assert mesh.router.n_sessions == 0
        assert (await run(mesh))[1] == expected_tokens(12)


async def test_leaving_in_the_middle_frees_all_stages() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session:
            async with aclosing(items_of(session)) as items:
                assert isinstance(await anext(items), Piece)
        await is_free(mesh)


async def test_timings_name_every_stage_of_the_decode_phase() -> None:
    async with memory_mesh(fake_chain((0, 1, 4))) as mesh:
        _, _, finished = await run(mesh, n_tokens_max=4)
    stages = finished.timings.stages
    assert [(stage.layer_start, stage.layer_end) for stage in stages] == [(0, 1), (1, 4)]
    assert all(stage.compute_ms >= 0 for stage in stages)


@pytest.mark.parametrize("piece_tokens", [16, 32, 2 * SCORED_TOKENS_MAX])
async def test_how_likely_the_tokens_of_the_prompt_are(piece_tokens: int) -> None:
    prompt = [(7 * number) % 60 for number in range(80)]
    engine = FakeEngine(fake_info(n_batch_tokens_max=256))
    engine.open_sequence(0, SamplingSettings(temperature=0.0, n_top_logprobs=2))
    (whole,) = engine.compute(
        [MicroBatch(sequence=0, position=0, tokens=tuple(prompt), scored=tuple(prompt[1:]))]
    )
    sampling = msgspec.structs.replace(GREEDY, n_top_logprobs=2)
    settings = SessionSettings(n_ctx=200, sampling=sampling, piece_tokens=piece_tokens)
    async with (
        memory_mesh(fake_chain((0, 1, 4))) as mesh,
        mesh.router.session(mesh.chain, mesh.links, settings) as session,
    ):
        scores: list[Sampled] = []
        await prefill(session, prompt, scores)
    assert [score.token for score in scores] == prompt[1:]
    assert [score.logprob for score in scores] == [score.logprob for score in whole.scores]
    assert all(len(score.top_logprobs) == 2 for score in scores)


async def test_a_stage_that_tells_of_other_tokens_is_not_believed() -> None:
    async with (
        memory_mesh(fake_chain((0, 4))) as mesh,
        mesh.router.session(mesh.chain, mesh.links, SETTINGS) as session,
    ):
        session.send(PROMPT, sample=True, scored=PROMPT[1:])
        done = await session.receive()
        feed = Feed(session.session_id)
        feed.add(PROMPT, sample=True, embed=False, scored=PROMPT[:-1])
        with pytest.raises(ProtocolError):
            feed.accept(done)
