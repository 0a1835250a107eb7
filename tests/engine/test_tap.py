"""The callback in C and the one in Python: the same results, and the same errors."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.chains import compute, micro, open_sequences, opened_chain
from support.models import write_model
from support.rule_models import write_rule_model

from shardmesh.engine import native_tap, tap
from shardmesh.engine.tap import HiddenTap
from shardmesh.errors import EngineError

SOURCE = Path(native_tap.__file__).with_name("tap_callback.c")

Use = Callable[[str], None]


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Use:
    """Has taps use the callback in "C", freshly compiled, or the one in "Python"."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    library = tmp_path / "tap.so"
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [compiler, "-O2", "-shared", "-fPIC", *warnings, "-o", library, SOURCE]
    subprocess.run(command, check=True, timeout=60)
    monkeypatch.setattr(native_tap, "_LIBRARY", library)
    native_tap.native_callback.cache_clear()
    function = native_tap.native_callback()
    native_tap.native_callback.cache_clear()
    assert function is not None

    def choose(callback: str) -> None:
        monkeypatch.setattr(tap, "native_callback", lambda: function if callback == "C" else None)

    return choose


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_both_give_the_same_bits(architecture: str, use: Use, tmp_path: Path) -> None:
    """llama takes hidden states as its input; gemma's are put into a node of the graph."""
    path = tmp_path / "model.gguf"
    if architecture == "gemma":
        write_rule_model(path, architecture)
    else:
        write_model(path, architecture, n_layer=8)
    logits = []
    for callback in ("Python", "C"):
        use(callback)
        with opened_chain(path, (3, 2, 3), tmp_path / callback) as chain:
            open_sequences(chain)
            (output,) = compute(chain, [micro(chain, list(range(1, 25)))])
            assert output.logits is not None
            logits.append(output.logits.tobytes())
    assert logits[0] == logits[1]


@pytest.mark.parametrize("callback", ["Python", "C"])
def test_a_graph_without_the_node_is_an_error(callback: str, use: Use) -> None:
    use(callback)
    hidden = HiddenTap(4, 8, input_node="inp_scaled")
    hidden.start([np.zeros((2, 4), dtype=np.float32)])
    with pytest.raises(EngineError, match="no place for the hidden states"):
        hidden.check()


@pytest.mark.parametrize("callback", ["Python", "C"])
def test_rows_that_did_not_come_are_an_error(callback: str, use: Use) -> None:
    use(callback)
    hidden = HiddenTap(4, 8, output_node="l_out-3")
    hidden.start([])
    with pytest.raises(EngineError, match="gave 0 rows of hidden states, not 2"):
        hidden.take(2)


def test_without_the_compiled_function_python_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_tap, "_LIBRARY", tmp_path / "nothing.so")
    native_tap.native_callback.cache_clear()
    assert native_tap.native_callback() is None
    native_tap.native_callback.cache_clear()
    assert HiddenTap(4, 8).callback is not None
