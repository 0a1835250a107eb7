"""Chains of engines in one process: cut a model, load its shards, pass micro-batches through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shardmesh.engine.base import Engine, EngineOptions, MicroBatch, Output, SamplingSettings
from shardmesh.engine.llama import load_engine
from shardmesh.shards.layers import ranges_of_counts
from shardmesh.shards.split import split_model

OPTIONS = EngineOptions(n_ctx=256, n_parallel=3, n_threads=1)


@contextmanager
def opened(path: Path, options: EngineOptions = OPTIONS) -> Iterator[Engine]:
    engine = load_engine(path, options)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def opened_chain(
    model: Path, n_layers: Sequence[int], out_dir: Path, options: EngineOptions = OPTIONS
) -> Iterator[list[Engine]]:
    """Cuts `model` into shards of so many layers each and loads them all."""
    manifest = split_model(model, ranges_of_counts(n_layers), out_dir, name="test")
    with ExitStack() as stack:
        yield [
            stack.enter_context(opened(out_dir / f"shard-{entry.shard_id}.gguf", options))
            for entry in manifest.shards
        ]


def open_sequences(
    chain: Sequence[Engine],
    sequences: Sequence[int] = (0,),
    sampling: SamplingSettings | None = None,
) -> None:
    for engine in chain:
        for sequence in sequences:
            engine.open_sequence(sequence, sampling)


def compute(chain: Sequence[Engine], batch: Sequence[MicroBatch]) -> list[Output]:
    """Passes one batch through all stages."""
    outputs: list[Output] = []
    for engine in chain:
        if outputs:
            batch = [
                MicroBatch(
                    sequence=micro.sequence,
                    position=micro.position,
                    hidden=output.hidden,
                    sample=micro.sample,
                    want_logits=micro.want_logits,
                    want_embedding=micro.want_embedding,
                    scored=micro.scored,
                )
                for micro, output in zip(batch, outputs, strict=True)
            ]
        outputs = engine.compute(batch)
    return outputs


def micro(
    chain: Sequence[Engine],
    tokens: Sequence[int],
    sequence: int = 0,
    *,
    sample: bool = False,
    want_logits: bool = True,
) -> MicroBatch:
    """The next tokens of a sequence."""
    return MicroBatch(
        sequence=sequence,
        position=chain[0].n_held(sequence),
        tokens=tuple(tokens),
        sample=sample,
        want_logits=want_logits,
    )
