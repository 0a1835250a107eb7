"""Going on with a text from its tokens: the same rest, or an error that says why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import aclosing

import msgspec
import pytest
from support.letters import Letters
from support.mesh import PIECE_TOKENS, RANDOM, MemoryMesh, memory_mesh

from shardmesh.coordinator.generate import Finished, Piece, generate
from shardmesh.coordinator.openings import SessionSettings
from shardmesh.coordinator.request import CompletionRequest
from shardmesh.coordinator.stops import StopScanner
from shardmesh.engine.fake import fake_chain
from shardmesh.engine.text import TextDecoder
from shardmesh.errors import InputError
from shardmesh.wire.messages import Sampling

PROMPT = [3, 1, 4, 1, 5]
N_TOKENS = 30
SAMPLED = msgspec.structs.replace(RANDOM, seed=11)
SETTINGS = SessionSettings(n_ctx=200, sampling=SAMPLED, piece_tokens=PIECE_TOKENS)


@dataclasses.dataclass
class Written:
    """What a generation gave: its text, its tokens, how it ended."""

    text: str
    tokens: list[int]
    end: Finished


async def write(
    mesh: MemoryMesh,
    given: Sequence[int] = (),
    *,
    settings: SessionSettings = SETTINGS,
    source: Letters | None = None,
    stops: tuple[str, ...] = (),
    n_at_most: int | None = None,
) -> Written:
    """Writes on behind `given`; `n_at_most` breaks off behind so many tokens, as a death does."""
    pieces: list[Piece] = []
    end = None
    async with mesh.router.session(mesh.chain, mesh.links, settings) as session:
        items = generate(
            session,
            PROMPT,
            n_tokens_max=N_TOKENS,
            source=source or Letters(),
            decoder=TextDecoder(),
            stops=StopScanner(stops),
            given=given,
        )
        async with aclosing(items):
            async for item in items:
                if isinstance(item, Finished):
                    end = item
                    break
                pieces.append(item)
                if len(pieces) == n_at_most:
                    break
    text = "".join(piece.text for piece in pieces)
    tokens = [piece.token.token for piece in pieces if piece.token is not None]
    return Written(text, tokens, end)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_before", [1, 2, 9, 17, N_TOKENS - 1])
async def test_the_rest_is_what_would_have_come(n_before: int) -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        whole = await write(mesh)
        begun = await write(mesh, n_at_most=n_before)
        assert begun.tokens == whole.tokens[:n_before]
        rest = await write(mesh, begun.tokens)
    assert len(set(whole.tokens)) > 5  # random numbers were drawn
    assert begun.tokens + rest.tokens == whole.tokens
    assert begun.text + rest.text == whole.text
    assert rest.end.reason == "length"


async def test_a_character_and_a_stop_string_that_were_cut() -> None:
    """Both lie across the place where the text was broken off."""
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        plain = await write(mesh)
        first, second, third, fourth = plain.tokens[3:7]
        source = Letters({first: b"\xc3", second: b"\xa4", third: b"st", fourth: b"op"})
        whole = await write(mesh, source=source, stops=("stop",))
        for n_before in range(1, len(whole.tokens)):
            begun = await write(mesh, source=source, stops=("stop",), n_at_most=n_before)
            rest = await write(mesh, begun.tokens, source=source, stops=("stop",))
            assert begun.text + rest.text == whole.text
            assert rest.end.reason == whole.end.reason == "stop"


async def test_a_text_that_was_over_is_over() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        plain = await write(mesh)
        n_before = plain.tokens.index(plain.tokens[4]) + 1
        source = Letters(ends=frozenset(plain.tokens[n_before - 1 : n_before]))
        over = await write(mesh, plain.tokens[:n_before], source=source)
        assert (over.text, over.tokens, over.end.reason) == ("", [], "stop")
        with pytest.raises(InputError, match="behind the end"):
            await write(mesh, plain.tokens, source=source)


async def test_what_this_request_does_not_give_is_not_continued() -> None:
    async with memory_mesh(fake_chain((0, 2, 4))) as mesh:
        whole = await write(mesh)
        wrong = [*whole.tokens[:6], (whole.tokens[6] + 1) % 60, *whole.tokens[7:9]]
        with pytest.raises(InputError, match="token 7 ") as caught:
            await write(mesh, wrong)
        assert caught.value.code == "CANNOT_RESUME"
        fields = {name: getattr(SAMPLED, name) for name in SAMPLED.__struct_fields__}
        other = SessionSettings(
            n_ctx=200, sampling=Sampling(**{**fields, "seed": 12}), piece_tokens=PIECE_TOKENS
        )
        with pytest.raises(InputError):
            await write(mesh, whole.tokens[:20], settings=other)


async def test_a_stage_that_dies_meanwhile_changes_nothing() -> None:
    spares = [[engine] for engine in fake_chain((0, 2, 4))]
    async with memory_mesh(fake_chain((0, 2, 4)), spares) as mesh:
        whole = await write(mesh)
        pieces: list[Piece | Finished] = []
        finder = mesh.replacements()
        async with mesh.router.session(mesh.chain, mesh.links, SETTINGS, finder) as session:
            items = generate(
                session,
                PROMPT,
                n_tokens_max=N_TOKENS,
                source=Letters(),
                decoder=TextDecoder(),
                stops=StopScanner(()),
                given=whole.tokens[:10],
            )
            async with aclosing(items):
                async for item in items:
                    pieces.append(item)
                    if len(pieces) == 3:
                        mesh.kill("stage-1")
            assert session.repairs
        tokens = [p.token.token for p in pieces if isinstance(p, Piece) and p.token is not None]
        assert tokens == whole.tokens[10:]


def test_more_than_was_asked_for_cannot_be_given() -> None:
    with pytest.raises(InputError, match="5 tokens were given"):
        CompletionRequest(prompt="x", n_tokens_max=5, given=(1,) * 5)
