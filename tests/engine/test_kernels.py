"""Shardmesh's kernel for Q8_0: the bits of ggml's, and out of the way where it cannot be used."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import write_model

from shardmesh.engine import kernel_library, kernels

SOURCE = Path(kernels.__file__).with_name("q8_matmul.c")
FLAGS = {flag for _, needed in kernel_library.INSTRUCTION_SETS for flag in needed}
EDGE_SCALES = (0.0, -0.0, 6e-8, -3e-5, 65504.0, float("inf"))


def library_of(name: str, folder: Path) -> Any:
    """The C file compiled for an instruction set; skips where that cannot be run."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    needed = dict(kernel_library.INSTRUCTION_SETS)[name]
    if compiler is None or not kernel_library._cpu_flags().issuperset(needed):
        pytest.skip(f"no C compiler, or a CPU without {name}")
    target = folder / f"{name}.so"
    options = ["-O3", *(f"-m{flag.replace('_', '')}" for flag in needed)]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [compiler, *options, *warnings, "-shared", "-fPIC", "-o", target, SOURCE]
    subprocess.run(command, check=True, timeout=60)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module", params=[name for name, _ in kernel_library.INSTRUCTION_SETS])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return library_of(request.param, tmp_path_factory.mktemp("kernel"))


def blocks(seed: int, n_rows: int, n_blocks: int, lowest: int) -> npt.NDArray[Any]:
    """Made-up rows, with the smallest and largest values there are among them."""
    generator = np.random.default_rng(seed)
    made = kernels._random_blocks(generator, n_rows, n_blocks)
    edges = generator.random((n_rows, n_blocks)) < 0.1
    made["scale"][edges] = generator.choice(EDGE_SCALES[:-1], edges.sum())
    extremes = generator.random(made["quants"].shape) < 0.1
    made["quants"][extremes] = generator.choice([lowest, 127, 0], extremes.sum())
    return made


@pytest.mark.hypothesis
@settings(deadline=None)  # the products of ggml are asked for one by one, by Python
@given(
    seed=st.integers(0, 2**32 - 1),
    n_weights=st.integers(1, 40),
    n_activations=st.integers(1, 20) | st.just(70),
    n_blocks=st.integers(1, 20) | st.sampled_from([100, 400, 1000]),
    n_threads=st.integers(1, 5),
)
def test_the_bits_are_those_of_ggml(
    library: Any, seed: int, n_weights: int, n_activations: int, n_blocks: int, n_threads: int
) -> None:
    """ggml's quantization of activations gives -127 to 127; weights come from a file."""
    n_weights = min(n_weights, 4000 // n_blocks + 1)
    weights = blocks(seed, n_weights, n_blocks, lowest=-128)
    activations = blocks(seed + 1, n_activations, n_blocks, lowest=-127)
    own = kernels.own_products(library, weights, activations, n_threads)
    assert own.tobytes() == kernels.ggml_products(weights, activations).tobytes()


def test_what_is_infinite_stays_so(library: Any) -> None:
    weights, activations = blocks(1, 4, 3, -127), blocks(2, 9, 3, -127)
    weights["scale"][2, 1] = EDGE_SCALES[-1]
    own = kernels.own_products(library, weights, activations)
    ggml = kernels.ggml_products(weights, activations)
    assert np.array_equal(own, ggml, equal_nan=True)
    assert not np.isfinite(own[:, 2]).any()


def test_rows_that_have_no_room_are_left_to_ggml(library: Any) -> None:
    weights, activations = blocks(1, 1, 4097, -127), blocks(2, 2, 4097, -127)
    assert np.isnan(kernels.own_products(library, weights, activations)).all()
    assert not np.isnan(kernels.own_products(library, weights[:, :4096].copy(), activations)).any()


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ((), "avx512"),
        (("avx512_vnni",), "avxvnni"),
        (("avx512vl", "avx_vnni"), "avx2"),
        (("fma",), None),
        (tuple(FLAGS), None),
    ],
)
def test_the_best_that_a_cpu_has(missing: tuple[str, ...], expected: str | None) -> None:
    assert kernel_library.choose_instruction_set(FLAGS - set(missing)) == expected


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was found out about the kernel is found out again, in the test and after it."""
    kernels._gives_the_same_bits.cache_clear()
    yield
    kernels._gives_the_same_bits.cache_clear()


def test_nothing_is_put_in_front_of_an_unknown_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel_library.preload() is None:
        pytest.skip("it cannot be used on this machine")
    monkeypatch.setattr(kernel_library, "GGML_VERSIONS", ("0.1",))
    assert kernel_library.preload.__wrapped__() is None


@pytest.mark.usefixtures("forgotten")
def test_a_kernel_that_differs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not kernels.use_own_kernels(True):
        pytest.skip("it cannot be used on this machine")
    kernels._gives_the_same_bits.cache_clear()

    def other_bits(*arguments: Any) -> npt.NDArray[np.float32]:
        return np.nextafter(
            kernels.own_products(kernel_library.preload(), *arguments), np.float32(1e9)
        )

    monkeypatch.setattr(kernels, "ggml_products", other_bits)
    assert not kernels.use_own_kernels(True)
    assert "differs from ggml's" in caplog.text


COMPUTE = """
import json, sys
from pathlib import Path
from shardmesh.engine.base import EngineOptions, MicroBatch
from shardmesh.engine.llama import load_engine
from shardmesh.engine import kernels

options = EngineOptions(n_ctx=256, n_parallel=8, n_threads=2, own_kernels=sys.argv[2] == "own")
engine = load_engine(Path(sys.argv[1]), options)
engine.join_sequences([8])
before, logits = kernels.n_products(), []
for sequence in range(8):
    engine.open_sequence(sequence)
for lengths in ([23, 1, 1, 1, 1, 1, 1, 2], [1] * 8, [1], [1] * 3):
    batch = []
    for sequence, length in enumerate(lengths):
        position = engine.n_held(sequence)
        tokens = tuple(range(sequence, sequence + length))
        batch.append(
            MicroBatch(sequence=sequence, position=position, tokens=tokens, want_logits=True)
        )
    logits += [output.logits.tobytes().hex() for output in engine.compute(batch)]
engine.close()
print(json.dumps([kernels.n_products() - before, logits]))
"""


def test_an_engine_computes_the_same_bits_with_it(tmp_path: Path) -> None:
    """In processes of their own: llama.cpp finds the kernel only if it was loaded before."""
    model = tmp_path / "model.gguf"
    write_model(model, n_layer=2, n_embd=256, weights="q8_0")
    results = {}
    for which in ("own", "llama.cpp"):
        command = [sys.executable, "-c", COMPUTE, str(model), which]
        done = subprocess.run(command, check=True, timeout=60, capture_output=True, env=os.environ)
        results[which] = json.loads(done.stdout)
    (n_own, own), (n_other, other) = results["own"], results["llama.cpp"]
    assert own == other
    assert n_other == 0
    if kernel_library.preload() is None:
        pytest.skip("Shardmesh's kernel cannot be used here: ggml computed both")
    assert n_own > 0
