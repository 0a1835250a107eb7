"""LoRA adapters cut along with a model, against llama.cpp with the whole of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.chains import OPTIONS, compute, micro
from support.models import BUILT_IN, write_lora, write_model

from shardmesh.engine.base import Engine
from shardmesh.engine.llama import LlamaEngine, load_engine
from shardmesh.errors import GgufError, InputError
from shardmesh.shards.layers import ranges_of_counts
from shardmesh.shards.manifest import Manifest
from shardmesh.shards.split import split_model
from shardmesh.shards.store import ShardStore

N_EMBD = 64
PROMPT = [(7 * i + 3) % 250 for i in range(24)]
WEIGHTS = tuple(
    (f"blk.{layer}.{name}.weight", n_columns, n_rows)
    for layer in (0, 1, 2)
    for name, n_columns, n_rows in (
        ("attn_q", N_EMBD, N_EMBD),
        ("attn_output", N_EMBD, N_EMBD),
        ("ffn_down", 2 * N_EMBD, N_EMBD),
    )
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.gguf", "llama", n_layer=4, vocabulary=BUILT_IN)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Changes layers 0 to 2: nothing in a shard of layer 3."""
    return write_lora(tmp_path / "tone.gguf", "llama", WEIGHTS)


def cut(model: Path, adapters: dict[str, Path], counts: Sequence[int], out_dir: Path) -> Manifest:
    return split_model(model, ranges_of_counts(counts), out_dir, name="m", adapters=adapters)


@contextmanager
def chain_of(manifest: Manifest, folder: Path) -> Iterator[list[Engine]]:
    store = ShardStore(folder)
    with ExitStack() as stack:
        chain: list[Engine] = []
        for shard in manifest.shards:
            adapters = store.adapters(shard.shard_id)
            chain.append(load_engine(store.shard_path(shard.shard_id), OPTIONS, adapters))
            stack.callback(chain[-1].close)
        yield chain


def steps(chain: Sequence[Engine], adapter: str, sequence: int = 0) -> list[bytes]:
    """The logits of a prefill and of single greedy tokens."""
    for engine in chain:
        engine.open_sequence(sequence, adapter=adapter)
    tokens, logits = PROMPT, []
    for _ in range(3):
        (output,) = compute(chain, [micro(chain, tokens, sequence)])
        assert output.logits is not None
        logits.append(output.logits.tobytes())
        tokens = [int(output.logits.argmax())]
    return logits


@pytest.mark.parametrize("counts", [(2, 2), (1, 2, 1), (4,)])
def test_a_chain_with_adapters_gives_the_bits_of_the_whole(
    counts: tuple[int, ...], model: Path, lora: Path, tmp_path: Path
) -> None:
    other = write_lora(tmp_path / "other.gguf", "llama", WEIGHTS[3:5], seed=2)
    adapters = {"tone": lora, "other": other}
    whole = load_engine(model, OPTIONS, adapters)
    expected = {name: steps([whole], name) for name in ("", "tone", "other")}
    whole.close()
    assert len({logits[0] for logits in expected.values()}) == 3, "the adapters change nothing"
    manifest = cut(model, adapters, counts, tmp_path / "out")
    assert [adapter.name for adapter in manifest.adapters] == ["tone", "other"]
    with chain_of(manifest, tmp_path / "out") as chain:
        assert all(engine.info.adapters == ("tone", "other") for engine in chain)
        for name in ("tone", "", "other", "tone", ""):  # chosen anew for each sequence
            assert steps(chain, name) == expected[name]


def test_sequences_with_different_adapters_do_not_mix(
    model: Path, lora: Path, tmp_path: Path
) -> None:
    manifest = cut(model, {"tone": lora}, (2, 2), tmp_path / "out")
    with chain_of(manifest, tmp_path / "out") as chain:
        expected = [steps(chain, name)[0] for name in ("tone", "")]
        for engine in chain:
            engine.open_sequence(0, adapter="tone")
            engine.open_sequence(1)
        outputs = compute(chain, [micro(chain, PROMPT, 0), micro(chain, PROMPT, 1)])
        found = [b"" if each.logits is None else each.logits.tobytes() for each in outputs]
        assert found == expected


def test_single_rows_with_an_adapter_are_computed_alone(
    model: Path, lora: Path, tmp_path: Path
) -> None:
    manifest = cut(model, {"tone": lora}, (4,), tmp_path / "out")
    with chain_of(manifest, tmp_path / "out") as (engine,):
        assert isinstance(engine, LlamaEngine)
        expected = steps([engine], "tone")[1]
        engine.join_sequences((2, 3))
        for sequence in range(3):
            engine.open_sequence(sequence, adapter="tone")
        prefills = engine.compute([micro([engine], PROMPT, n) for n in range(3)])
        assert prefills[0].logits is not None
        token = int(prefills[0].logits.argmax())
        outputs = engine.compute([micro([engine], [token], n) for n in range(3)])
        assert [o.logits.tobytes() for o in outputs if o.logits is not None] == [expected] * 3


def test_an_adapter_of_another_name_is_refused(model: Path, lora: Path, tmp_path: Path) -> None:
    manifest = cut(model, {"tone": lora}, (4,), tmp_path / "out")
    with chain_of(manifest, tmp_path / "out") as (engine,):
        with pytest.raises(InputError) as caught:
            engine.open_sequence(0, adapter="none")
    assert caught.value.code == "NO_ADAPTER"


def test_a_part_that_is_missing_or_damaged(model: Path, lora: Path, tmp_path: Path) -> None:
    cut(model, {"tone": lora}, (2, 1, 1), tmp_path / "out")
    store = ShardStore(tmp_path / "out")
    assert store.adapters(2) == {"tone": None}
    part = tmp_path / "out" / "adapter-0-1.gguf"
    assert store.adapters(1) == {"tone": part}
    part.write_bytes(part.read_bytes()[:-32] + bytes(32))
    with pytest.raises(GgufError, match="SHA-256"):
        store.adapters(1)
    part.unlink()
    assert store.adapters(1) == {}


@pytest.mark.parametrize(
    ("weights", "architecture", "sentence"),
    [
        ((("blk.9.attn_q.weight", 64, 64),), "llama", "which the model does not have"),
        ((("blk.0.attn_q.weight", 64, 64),), "qwen2", "is for qwen2"),
        ((("output.weight", 64, 8),), "llama", "output head"),
        ((), "llama", "changes nothing"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    weights: tuple[tuple[str, int, int], ...],
    architecture: str,
    sentence: str,
    model: Path,
    tmp_path: Path,
) -> None:
    adapter = write_lora(tmp_path / "a.gguf", architecture, weights)
    with pytest.raises(GgufError, match=sentence) as caught:
        cut(model, {"a": adapter}, (2, 2), tmp_path / "out")
    assert caught.value.code == "BAD_ADAPTER"
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_model_is_no_adapter(model: Path, tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="is not a LoRA adapter"):
        cut(model, {"a": model}, (2, 2), tmp_path / "out")


def test_splitting_again_removes_the_parts_of_before(
    model: Path, lora: Path, tmp_path: Path
) -> None:
    cut(model, {"tone": lora}, (2, 2), tmp_path / "out")
    cut(model, {}, (2, 2), tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter-*"))
