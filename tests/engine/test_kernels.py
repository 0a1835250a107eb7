"""Shardmesh's kernels: the bits of ggml's, and out of the way where they cannot be used."""

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

FOLDER = Path(kernels.__file__).parent
SOURCES = [FOLDER / name for name in ("matmul.c", "q8_matmul.c", "f16_matmul.c")]
FLAGS = {flag for _, needed in kernel_library.INSTRUCTION_SETS for flag in needed}
EDGE_SCALES = (0.0, -0.0, 6e-8, -3e-5, 65504.0, float("inf"))
EDGE_VALUES = (0.0, -0.0, 6e-8, -3e-5, 300.0)


def library_of(name: str, folder: Path) -> Any:
    """The C files compiled for an instruction set; skips where that cannot be run."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    needed = dict(kernel_library.INSTRUCTION_SETS)[name]
    if compiler is None or not kernel_library._cpu_flags().issuperset(needed):
        pytest.skip(f"no C compiler, or a CPU without {name}")
    target = folder / f"{name}.so"
    options = ["-O3", *(f"-m{flag.replace('_', '')}" for flag in needed)]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [compiler, *options, *warnings, "-shared", "-fPIC", "-o", target, *SOURCES]
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
def test_q8_0_gives_the_bits_of_ggml(
    library: Any, seed: int, n_weights: int, n_activations: int, n_blocks: int, n_threads: int
) -> None:
    """ggml's quantization of activations gives -127 to 127; weights come from a file."""
    n_weights = min(n_weights, 4000 // n_blocks + 1)
    weights = blocks(seed, n_weights, n_blocks, lowest=-128)
    activations = blocks(seed + 1, n_activations, n_blocks, lowest=-127)
    own = kernels.own_q8_products(library, weights, activations, n_threads)
    assert own.tobytes() == kernels.ggml_q8_products(weights, activations).tobytes()


def test_what_is_infinite_stays_so(library: Any) -> None:
    weights, activations = blocks(1, 4, 3, -127), blocks(2, 9, 3, -127)
    weights["scale"][2, 1] = EDGE_SCALES[-1]
    own = kernels.own_q8_products(library, weights, activations)
    ggml = kernels.ggml_q8_products(weights, activations)
    assert np.array_equal(own, ggml, equal_nan=True)
    assert not np.isfinite(own[:, 2]).any()


def test_rows_that_have_no_room_are_left_to_ggml(library: Any) -> None:
    weights, activations = blocks(1, 1, 4097, -127), blocks(2, 2, 4097, -127)
    assert np.isnan(kernels.own_q8_products(library, weights, activations)).all()
    assert not np.isnan(
        kernels.own_q8_products(library, weights[:, :4096].copy(), activations)
    ).any()


def halves(seed: int, *shape: int) -> npt.NDArray[np.float16]:
    """Made-up values, with zeros, the smallest and some large ones among them."""
    generator = np.random.default_rng(seed)
    made = generator.standard_normal(shape).astype(np.float16)
    edges = generator.random(shape) < 0.1
    made[edges] = generator.choice(EDGE_VALUES, edges.sum())
    return made


def sums_in_lanes(
    rows: npt.NDArray[np.float16], row: npt.NDArray[np.float16], lanes: int
) -> npt.NDArray[np.float32]:
    """The same by numpy: products of halves are exact, so that each addition rounds once."""
    products = rows.astype(np.float32) * row.astype(np.float32)
    steps = products.reshape(len(rows), -1, 4, lanes)
    sums = np.zeros((len(rows), 4, lanes), dtype=np.float32)
    for step in range(steps.shape[1]):
        sums = sums + steps[:, step]
    left = (sums[:, 0] + sums[:, 2]) + (sums[:, 1] + sums[:, 3])
    left = left[:, : lanes // 2] + left[:, lanes // 2 :]
    if lanes == 16:  # halves, to the end
        left = left[:, :4] + left[:, 4:]
        left = left[:, :2] + left[:, 2:]
    else:  # neighbours
        left = left[:, ::2] + left[:, 1::2]
    return np.asarray(left[:, 0] + left[:, 1])


@pytest.mark.hypothesis
@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lanes=st.sampled_from(kernels.F16_LANES),
    n_rows=st.integers(1, 70),
    n_steps=st.integers(1, 8) | st.just(40),
    n_apart=st.integers(0, 100),
    n_threads=st.integers(1, 5),
)
def test_f16_is_added_up_as_ggml_does(
    library: Any, seed: int, lanes: int, n_rows: int, n_steps: int, n_apart: int, n_threads: int
) -> None:
    """`n_apart`: values between two rows, as a cache for more positions than are in use has."""
    n_values = 4 * lanes * n_steps
    rows, row = halves(seed, n_rows, n_values + n_apart)[:, :n_values], halves(seed + 1, n_values)
    own = kernels.own_f16_products(library, lanes, rows, row, n_threads)
    if np.isnan(own).all():
        assert lanes == 16, "each CPU has eight lanes"
        return
    assert own.tobytes() == sums_in_lanes(rows, row, lanes).tobytes()
    if lanes == kernels._equal_f16_lanes(library):
        assert own.tobytes() == kernels.ggml_f16_products(rows, row).tobytes()


def test_one_way_of_adding_up_is_that_of_ggml(library: Any, request: Any) -> None:
    if kernel_library.choose_instruction_set(kernel_library._cpu_flags()) not in request.node.name:
        pytest.skip("ggml was built for the best that this CPU has")
    assert kernels._equal_f16_lanes(library) in kernels.F16_LANES


def test_f16_rows_with_a_remainder_are_left_to_ggml(library: Any) -> None:
    own = kernels.own_f16_products(library, 8, halves(1, 3, 80), halves(2, 80))
    assert np.isnan(own).all()


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
    """What was found out about the kernels is found out again, in the test and after it."""
    checks = (kernels._q8_is_equal, kernels._equal_f16_lanes)
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()


def test_nothing_is_put_in_front_of_an_unknown_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel_library.preload() is None:
        pytest.skip("it cannot be used on this machine")
    monkeypatch.setattr(kernel_library, "GGML_VERSIONS", ("0.1",))
    assert kernel_library.preload.__wrapped__() is None


@pytest.mark.usefixtures("forgotten")
def test_kernels_that_differ_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if kernel_library.preload() is None:
        pytest.skip("they cannot be used on this machine")
    multiply = kernels._ggml_products

    def other_bits(*arguments: Any) -> npt.NDArray[np.float32]:
        return np.nextafter(multiply(*arguments), np.float32(1e9))

    monkeypatch.setattr(kernels, "_ggml_products", other_bits)
    assert not kernels.use_own_kernels(True)
    assert "for Q8_0 differs from ggml's" in caplog.text
    assert "for F16 differs from ggml's" in caplog.text


COMPUTE = """
import json, sys
from pathlib import Path
from shardmesh.engine.base import EngineOptions, MicroBatch
from shardmesh.engine.llama import load_engine
from shardmesh.engine import kernels

options = EngineOptions(n_ctx=256, n_parallel=8, n_threads=2, own_kernels=sys.argv[2] == "own")
engine = load_engine(Path(sys.argv[1]), options)
engine.join_sequences([8])
before, logits = kernels.count_products(), []
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
after = kernels.count_products()
print(json.dumps([after.q8 - before.q8, after.f16 - before.f16, logits]))
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
    *n_own, own = results["own"]
    *n_other, other = results["llama.cpp"]
    assert own == other
    assert n_other == [0, 0]
    if kernel_library.preload() is None:
        pytest.skip("Shardmesh's kernels cannot be used here: ggml computed both")
    assert min(n_own) > 0
