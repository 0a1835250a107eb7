"""KV that was copied to another engine has the bits of the original; so has all that follows."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.chains import opened, opened_chain
from support.models import write_model
from support.rule_models import write_rule_model

from shardmesh.engine import llama_state
from shardmesh.engine.base import Engine, EngineOptions, MicroBatch, SamplingSettings
from shardmesh.engine.cells import UnknownStateError, cells_of, layout_of, state_of
from shardmesh.engine.fake import FakeEngine, fake_info
from shardmesh.engine.llama import LlamaEngine
from shardmesh.engine.options import CACHE_TYPES
from shardmesh.errors import EngineError, InputError

GREEDY = SamplingSettings(temperature=0.0)
PIECE = 32
_CHANCE = np.random.default_rng(11)
PROMPT = _CHANCE.integers(0, 200, 300).tolist()
OTHER = _CHANCE.integers(0, 200, 300).tolist()

CASES = [
    # architecture, weights, sliding window, type of K, type of V, flash attention
    ("llama", "f32", 0, "f16", "f16", False),
    ("llama", "f32", 0, "f16", "f16", True),
    ("llama", "q4_k", 0, "f32", "f32", False),
    ("llama", "q8_0", 0, "q8_0", "q8_0", True),
    ("llama", "f16", 0, "q4_0", "f16", False),
    ("llama", "f16", 0, "bf16", "q5_1", True),
    ("llama", "f16", 0, "q4_1", "q5_0", True),
    ("qwen3", "f16", 0, "f16", "f16", False),
    ("mixtral", "f16", 0, "f16", "f16", False),
    ("phi3", "f16", 64, "f16", "f16", False),
]


def test_all_types_of_the_cache_are_tried() -> None:
    assert {name for case in CASES for name in case[3:5]} == set(CACHE_TYPES)


def options(type_k: str = "f16", type_v: str = "f16", flash: bool = False) -> EngineOptions:
    return EngineOptions(
        n_ctx=512,
        n_parallel=3,
        n_threads=1,
        cache_type_k=type_k,
        cache_type_v=type_v,
        flash_attention=flash,
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LlamaEngine, LlamaEngine]]:
    """Two engines with the same model, as two machines would have them."""
    architecture, weights, window, type_k, type_v, flash = request.param
    path: Path = tmp_path_factory.mktemp("model") / "m.gguf"
    write_model(
        path,
        architecture,
        n_layer=2,
        weights=weights,
        vocabulary="built-in",
        n_embd=256,
        sliding_window=window,
    )
    with ExitStack() as stack:
        engines = [
            stack.enter_context(opened(path, options(type_k, type_v, flash))) for _ in range(2)
        ]
        one, other = engines
        assert isinstance(one, LlamaEngine)
        assert isinstance(other, LlamaEngine)
        for engine in (one, other):
            engine.learn_cells()
            assert engine.info.cell_bytes > 0
        yield one, other


def feed(engine: Engine, sequence: int, tokens: list[int], start: int, end: int) -> None:
    for position in range(start, end, PIECE):
        piece = tuple(tokens[position : min(position + PIECE, end)])
        engine.compute([MicroBatch(sequence=sequence, position=position, tokens=piece)])


def rest(engine: Engine, sequence: int, start: int) -> list[bytes]:
    """The logits of the prompt's last tokens, with what lies before them computed from `start`."""
    n_pieces = 8 * PIECE
    feed(engine, sequence, PROMPT, start, n_pieces)
    logits = []
    for position in range(n_pieces, n_pieces + 12):
        micro = MicroBatch(
            sequence=sequence, position=position, tokens=(PROMPT[position],), want_logits=True
        )
        (output,) = engine.compute([micro])
        assert output.logits is not None
        logits.append(output.logits.tobytes())
    return logits


@pytest.mark.parametrize("n_copied", [1, 31, 32, 96, 97, 256])
def test_a_copy_goes_on_with_the_same_bits(
    pair: tuple[LlamaEngine, LlamaEngine], n_copied: int
) -> None:
    """Read in parts while the source goes on, written into a sequence that held something else."""
    one, other = pair
    one.open_sequence(1, GREEDY)
    wanted = rest(one, 1, 0)
    middle = n_copied // 2
    bounds = [(0, middle), (middle, n_copied)] if middle else [(0, n_copied)]
    parts = [one.read_cells(1, start, end) for start, end in bounds]
    other.open_sequence(2, GREEDY)
    feed(other, 2, OTHER, 0, 5 * PIECE)
    other.close_sequence(2, n_keep=2 * PIECE)
    other.open_sequence(0, GREEDY)
    feed(other, 0, OTHER, 0, 3 * PIECE)
    other.write_cells(2, np.concatenate(parts))
    assert other.n_held(2) == n_copied
    n_keep = n_copied // PIECE * PIECE  # micro-batches keep their borders
    other.open_sequence(2, GREEDY, n_keep=n_keep)
    assert rest(other, 2, n_keep) == wanted
    again = one.read_cells(1, 0, 8 * PIECE)
    assert other.read_cells(2, 0, 8 * PIECE).tobytes() == again.tobytes()
    for engine in pair:
        for sequence in range(3):
            engine.close_sequence(sequence)


def pieces(engine: Engine, sequence: int, start: int, end: int) -> None:
    for position in range(start, end, 4):
        piece = tuple(PROMPT[position : position + 4])
        engine.compute([MicroBatch(sequence=sequence, position=position, tokens=piece)])


def singles(engine: Engine, sequence: int) -> list[bytes]:
    logits = []
    for position in range(40, 46):
        token = (PROMPT[position],)
        micro = MicroBatch(sequence=sequence, position=position, tokens=token, want_logits=True)
        (output,) = engine.compute([micro])
        assert output.logits is not None
        logits.append(output.logits.tobytes())
    return logits


@contextmanager
def rule_pair(folder: Path, architecture: str) -> Iterator[list[LlamaEngine]]:
    model = write_rule_model(folder / "m.gguf", architecture)
    with opened(model) as one, opened(model) as other:
        assert isinstance(one, LlamaEngine)
        assert isinstance(other, LlamaEngine)
        one.learn_cells()
        other.learn_cells()
        yield [one, other]


@pytest.mark.parametrize("architecture", ["gemma3", "cohere2", "minicpm3", "glm4", "baichuan"])
def test_other_kinds_of_caches(architecture: str, tmp_path: Path) -> None:
    """Two of them with a sliding window of eight positions, one with compressed keys."""
    with rule_pair(tmp_path, architecture) as (one, other):
        one.open_sequence(1, GREEDY)
        parts = []
        for position in range(0, 40, 4):
            pieces(one, 1, position, position + 4)
            parts.append(one.read_cells(1, position, position + 4))
        wanted = singles(one, 1)
        for n_keep in (4, 20, 40):  # a copy may be rolled back
            other.write_cells(0, np.concatenate(parts))
            other.open_sequence(0, GREEDY, n_keep=40)
            other.trim_sequence(0, n_keep)
            pieces(other, 0, n_keep, 40)
            assert singles(other, 0) == wanted
            other.close_sequence(0)


@pytest.mark.parametrize("architecture", ["gemma3", "cohere2"])
def test_what_a_sliding_window_has_left_behind_cannot_be_copied(
    architecture: str, tmp_path: Path
) -> None:
    with rule_pair(tmp_path, architecture) as (one, _):
        one.open_sequence(0, GREEDY)
        pieces(one, 0, 0, 40)
        with pytest.raises(EngineError):
            one.read_cells(0, 0, 40)


@pytest.mark.parametrize("architecture", ["lfm2", "hy_v4"])
def test_a_state_of_another_kind_is_not_copied(architecture: str, tmp_path: Path) -> None:
    """One that cannot be rolled back either, and one whose layers have caches of their own."""
    with rule_pair(tmp_path, architecture) as (one, _):
        assert one.info.cell_bytes == 0
        one.open_sequence(0, GREEDY)
        pieces(one, 0, 0, 8)
        with pytest.raises(EngineError):
            one.read_cells(0, 0, 8)


def test_every_stage_of_a_chain_can_copy(tmp_path: Path) -> None:
    """Also those that get hidden states, and those without a vocabulary."""
    model = write_model(tmp_path / "m.gguf", n_layer=3, vocabulary="built-in")
    with opened_chain(model, (1, 1, 1), tmp_path / "shards") as chain:
        for engine in chain:
            assert isinstance(engine, LlamaEngine)
            engine.learn_cells()
            assert engine.info.cell_bytes > 0
            assert engine.n_held(0) == 0


def test_a_state_that_is_too_large_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m.gguf", n_layer=1, vocabulary="built-in")
    with opened(model) as engine:
        assert isinstance(engine, LlamaEngine)
        engine.learn_cells()
        assert llama_state.COPIED_STATE_BYTES_MAX == 512 * 2**20
        engine.open_sequence(0)
        pieces(engine, 0, 0, 8)
        n_bytes = len(engine._states._state(0))
        monkeypatch.setattr(llama_state, "COPIED_STATE_BYTES_MAX", n_bytes)
        engine.read_cells(0, 0, 8)
        pieces(engine, 0, 8, 12)
        with pytest.raises(EngineError):
            engine.read_cells(0, 0, 12)


def test_a_model_with_too_much_for_one_frame_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "m.gguf", n_layer=1, vocabulary="built-in")
    with opened(model) as engine:
        assert isinstance(engine, LlamaEngine)
        engine.learn_cells()
        for n_bytes, is_copied in ((engine.info.cell_bytes, True), (127, False)):
            monkeypatch.setattr(llama_state, "KV_COPY_BYTES_MAX", n_bytes)
            engine.learn_cells()
            assert (engine.info.cell_bytes > 0) == is_copied


@pytest.mark.parametrize("kind", ["llama", "fake"])
def test_what_is_not_there_cannot_be_copied(kind: str, tmp_path: Path) -> None:
    if kind == "fake":
        check_refusals(FakeEngine(fake_info(0, 4, 4)))
        return
    model = write_model(tmp_path / "m.gguf", n_layer=1, vocabulary="built-in")
    with opened(model) as engine:
        assert isinstance(engine, LlamaEngine)
        engine.learn_cells()
        check_refusals(engine)


def check_refusals(engine: Engine) -> None:
    info = engine.info
    engine.open_sequence(0, GREEDY)
    engine.compute([MicroBatch(sequence=0, position=0, tokens=(1, 2, 3))])
    for start, end in ((0, 4), (2, 2), (-1, 2), (3, 1)):
        with pytest.raises(InputError):
            engine.read_cells(0, start, end)
    with pytest.raises(InputError):
        engine.read_cells(99, 0, 1)
    cells = engine.read_cells(0, 0, 3)
    assert cells.shape == (3, info.cell_bytes)
    with pytest.raises(InputError):
        engine.write_cells(0, cells)  # it is open
    for shape in (
        (0, info.cell_bytes),
        (3, info.cell_bytes - 1),
        (info.n_ctx + 1, info.cell_bytes),
    ):
        with pytest.raises(InputError):
            engine.write_cells(1, np.zeros(shape, dtype=np.uint8))
    assert engine.n_held(1) == 0


def a_state() -> tuple[bytes, int]:
    """One of a cache with two layers, transposed values and three sequences, and its length."""
    n_cells = 4
    keys = [struct.pack("<iQ", 1, 6) + bytes(range(6 * n_cells)) for _ in range(2)]
    values = [struct.pack("<iII", 1, 2, 3) + bytes(range(6 * n_cells)) for _ in range(2)]
    cells = b"".join(struct.pack("<iIi", position, 1, 1) for position in range(n_cells))
    layers = struct.pack("<II", 1, 2) + b"".join(keys + values)
    head = struct.pack("<IIIII", 0xAF143CD8, 1, 3, 0, n_cells)
    return head + cells + layers + bytes(4), n_cells


def test_a_state_comes_apart_and_together() -> None:
    state, n_cells = a_state()
    layout = layout_of(memoryview(state), 3)
    assert layout.cell_bytes == 24
    parts = [cells_of(layout, memoryview(state), i, i + 1) for i in range(n_cells)]
    assert state_of(layout, np.concatenate(parts), 1) == state
    other = state_of(layout, parts[0], 2)
    assert cells_of(layout, memoryview(other), 0, 1).tobytes() == parts[0].tobytes()


@given(st.data())
def test_a_state_that_is_cut_or_altered_is_never_read_beyond_its_end(data: st.DataObject) -> None:
    state, _ = a_state()
    layout = layout_of(memoryview(state), 3)
    altered = bytearray(state[: data.draw(st.integers(0, len(state)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if altered:
            altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    try:
        cells = cells_of(layout, memoryview(bytes(altered)), 1, 4)
    except UnknownStateError:
        return
    assert cells.shape == (3, layout.cell_bytes)
