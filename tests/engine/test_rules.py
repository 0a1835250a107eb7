"""For each kind of rule a model that would be cut wrongly without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.chains import compute, micro, open_sequences, opened, opened_chain
from support.models import TensorData, u32_value
from support.rule_models import N_LAYER, read_model, replace_model, write_rule_model

from shardmesh.engine.base import Engine
from shardmesh.engine.llama_model import read_facts
from shardmesh.engine.tap import HiddenTap
from shardmesh.errors import EngineError, GgufError
from shardmesh.shards.gguf_file import GgufFile, Tensor
from shardmesh.shards.gguf_values import string, uint32
from shardmesh.wire.limits import STREAMS_MAX

PROMPT = [(7 * i + 3) % 250 for i in range(24)]  # three times the window of the models
N_STEPS = 3


def logits_of(chain: Sequence[Engine]) -> list[bytes]:
    """A prefill, then single greedy tokens."""
    open_sequences(chain)
    tokens, steps = PROMPT, []
    for _ in range(1 + N_STEPS):
        (output,) = compute(chain, [micro(chain, tokens)])
        assert output.logits is not None
        assert output.logits.std() > 0.05, "logits that are all alike prove nothing"
        steps.append(output.logits.tobytes())
        tokens = [int(output.logits.argmax())]
    return steps


@pytest.mark.parametrize(
    ("architecture", "cut"),
    [
        ("gemma", (3, 2, 3)),
        ("granite", (1, 6, 1)),
        ("cohere2", (2, 3, 3)),
        ("internlm2", (3, 4, 1)),
        ("smollm3", (4, 4)),
        ("glm4", (5, 2, 1)),
        ("gemma3", (20, 41, 1)),
        ("minicpm3", (3, 1, 4)),
        ("baichuan", (7, 24, 1)),
        ("hy_v4", (3, 1, 4)),
        ("lfm2", (3, 2, 3)),
    ],
)
def test_cut_equals_whole(architecture: str, cut: tuple[int, ...], tmp_path: Path) -> None:
    model = write_rule_model(tmp_path / "model.gguf", architecture)
    with opened(model) as whole:
        expected = logits_of([whole])
    with opened_chain(model, cut, tmp_path / "shards") as chain:
        assert logits_of(chain) == expected


def test_layers_for_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    model = write_rule_model(tmp_path / "model.gguf", "glm4", n_embd=96)
    metadata, tensors = read_model(model)
    metadata["glm4.nextn_predict_layers"] = u32_value(1)
    last = N_LAYER - 1
    for name, shape in (("eh_proj", (192, 96)), ("enorm", (96,)), ("hnorm", (96,))):
        data = np.ones(shape, dtype=np.float32).tobytes()
        tensors.append(TensorData(f"blk.{last}.nextn.{name}.weight", shape, 0, data))
    replace_model(model, metadata, tensors)
    with opened(model) as whole:
        expected = logits_of([whole])
    with opened_chain(model, (3, 1, 3), tmp_path / "shards") as chain:
        assert logits_of(chain) == expected


def test_hidden_states_that_found_no_place_are_an_error() -> None:
    tap = HiddenTap(4, 8, input_node="inp_scaled")
    tap.start([np.zeros((2, 4), dtype=np.float32)])
    with pytest.raises(EngineError, match="no place for the hidden states"):
        tap.check()


@pytest.mark.parametrize(
    ("has_positions", "layer_start", "expected"),
    [(True, 2, "inpL"), (False, 2, ""), (True, 0, "")],
)
def test_a_node_of_the_graph_that_only_some_files_have(
    has_positions: bool, layer_start: int, expected: str
) -> None:
    path = Path("m.gguf")
    metadata = {
        "general.architecture": string("mpt"),
        "mpt.block_count": uint32(2),
        "shardmesh.layer_start": uint32(layer_start),
    }
    positions = Tensor("position_embd.weight", (8, 16), 0, 512, path, 0)
    model = GgufFile(path, 3, 32, metadata, (positions,) * has_positions, 512)
    assert read_facts(model).input_node == expected


@pytest.mark.parametrize("n_streams", [0, STREAMS_MAX + 1])
def test_a_number_of_hidden_states_of_a_token_that_makes_no_sense(n_streams: int) -> None:
    metadata = {
        "general.architecture": string("hy_v4"),
        "hy_v4.block_count": uint32(2),
        "hy_v4.hyper_connection.count": uint32(n_streams),
    }
    with pytest.raises(GgufError, match="make sense"):
        read_facts(GgufFile(Path("m.gguf"), 3, 32, metadata, (), 0))
