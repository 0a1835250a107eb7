"""Which architectures can be cut, and what each needs beyond the general rules.

The general rules, which `slices` follows for all: blocks renumbered from 0, `block_count` the
length of the range, arrays with one item per layer cut, counts of leading layers less those before
the range, rope tensors in every shard, the head in the place of `token_embd` on the last stage
(llama.cpp then ties them).  An architecture stands here only when chains of its shards were found
equal, bit for bit, to the whole model at every legal cut: `make archs` does that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from shardmesh.errors import GgufError
from shardmesh.shards.architecture_rules import ArchitectureRules, GraphConstants, WindowPattern
from shardmesh.shards.gguf_file import GgufFile
from shardmesh.wire.limits import MODEL_LAYERS_MAX

PLAIN: Final = ArchitectureRules()
HEAD: Final = ArchitectureRules(needs_head=True)
SCALED: Final = ArchitectureRules(keys_set_to_zero=frozenset({"embedding_scale"}))
RECURRENT: Final = ArchitectureRules(recurrent=True, rolls_back=False)
INTERVAL: Final = dataclasses.replace(RECURRENT, writes_recurrent=True)
NEMOTRON_H: Final = dataclasses.replace(
    RECURRENT, one_part_a_layer=True, output_node="nemotron_h_block_out"
)
LISTED_WINDOWS: Final = ArchitectureRules(window_everywhere=True)
STREAMS: Final = ArchitectureRules(
    streams_key="hyper_connection.count", input_node="hc_init", fed_as_tokens=True, needs_head=True
)


def windows(
    period: int, *, full_first: bool = False, needs_head: bool = False
) -> ArchitectureRules:
    """Layers with and without a window in turns."""
    return ArchitectureRules(
        window=WindowPattern(period=period, full_first=full_first),
        window_everywhere=True,
        needs_head=needs_head,
    )


_DIFFUSION: Final = "it writes a text as a whole by diffusion, not token by token"
_ENCODER: Final = "it reads a text from both ends at once and does not write any"
_ENCODERS: Final = (
    *("bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llama-embed"),
    *("modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe"),
)
_MANY: Final = frozenset(range(64, MODEL_LAYERS_MAX + 1))

_ONLY_HEAD: Final = (
    *("bailingmoe", "bailingmoe2", "codeshell", "dbrx", "dots1", "gptneox", "internlm2", "jais"),
    *("minimax-m2", "minimax-m3", "nemotron", "olmoe", "orion", "phi2", "phimoe", "plamo", "qwen"),
    *("qwen2moe", "stablelm", "xverse"),
)
_PLAIN: Final = (
    *("llama", "qwen2", "qwen3", "phi3"),  # Mistral and Mixtral are llama; phi3's window is ignored
    *("arcee", "arctic", "chatglm", "deci", "deepseek", "deepseek32", "ernie4_5", "exaone"),
    *("falcon", "glm-dsa", "glm4moe", "grovemoe", "hunyuan-dense", "hunyuan-moe"),
    *("hunyuan_vl", "hy_v3", "jais2", "maincoder", "mistral3", "mistral4"),
    *("olmo", "openelm", "paddleocr", "pangu-embedded", "pockettts", "qwen2vl", "qwen3moe"),
    *("qwen3tts", "qwen3vl", "qwen3vlmoe", "refact", "seed_oss", "starcoder2"),
)

RULES: Final[Mapping[str, ArchitectureRules]] = MappingProxyType(
    {
        # -- llama.cpp scales, norms or shifts what comes in ----------------------------------
        "gemma": ArchitectureRules(input_node="inp_scaled"),
        "grok": SCALED,
        "granite": SCALED,
        "granitemoe": SCALED,
        "minicpm": SCALED,  # its scale of the residuals is written out, see `written_out`
        "minicpm3": ArchitectureRules(
            input_node="inp_scaled", graph_constants=GraphConstants.RESIDUAL_SCALE
        ),
        "bloom": ArchitectureRules(input_node="inp_norm-0"),
        "gpt2": ArchitectureRules(input_node="inpL", note="learned positions"),
        "starcoder": ArchitectureRules(input_node="inpL", note="learned positions"),
        "mpt": ArchitectureRules(input_node="inpL", input_tensor="position_embd.weight"),
        "cogvlm": ArchitectureRules(input_node="embd", fed_as_tokens=True, note="text part"),
        "glm4": ArchitectureRules(input_node="embd", fed_as_tokens=True),
        # -- sliding windows --------------------------------------------------------------------
        "gemma2": dataclasses.replace(
            windows(2),
            input_node="inp_scaled",
            special_layer_counts=frozenset({46}),
            graph_constants=GraphConstants.QUERY_SCALE,
        ),
        "gemma3": dataclasses.replace(
            windows(6),
            special_layer_counts=frozenset({62}),
            graph_constants=GraphConstants.QUERY_SCALE,
        ),
        "gpt-oss": windows(2, needs_head=True),
        "cohere2": windows(4),
        "cohere2moe": windows(4, full_first=True),
        "olmo2": windows(4, needs_head=True),
        "exaone4": ArchitectureRules(
            special_layer_counts=frozenset({64}),
            refused_layer_counts=(
                frozenset({64}),
                "llama.cpp switches its sliding windows on only in a file with all of them",
            ),
        ),
        "exaone-moe": windows(4, needs_head=True),
        "mellum": windows(4, needs_head=True),
        "plamo3": windows(8),
        "laguna": windows(4, full_first=True),
        # With as many layers as its step, llama.cpp would rotate in all of them.
        "smallthinker": dataclasses.replace(
            windows(4, full_first=True),
            step=4,
            special_layer_counts=frozenset({4}),
            refused_layer_counts=(frozenset({4}), "a shard can only begin at every fourth layer"),
        ),
        "llama4": dataclasses.replace(
            windows(4),
            step=4,
            whole_step_everywhere=True,
            step_key="interleave_moe_layer_step",
            keys_not_zero=frozenset({"attention.sliding_window"}),
        ),
        "afmoe": dataclasses.replace(windows(4), input_node="inp_embd_scaled", step=4),
        "muse-glimmer": dataclasses.replace(windows(4, needs_head=True), input_node="embd_norm"),
        "granite_swa": dataclasses.replace(
            LISTED_WINDOWS, keys_set_to_zero=SCALED.keys_set_to_zero
        ),
        "spark2_5": LISTED_WINDOWS,
        "mimo2": dataclasses.replace(LISTED_WINDOWS, needs_head=True),
        "maple": dataclasses.replace(LISTED_WINDOWS, needs_head=True),
        "dots3note": dataclasses.replace(LISTED_WINDOWS, full_everywhere=True),
        # -- attention and recurrent layers -----------------------------------------------------
        "granitehybrid": dataclasses.replace(RECURRENT, keys_set_to_zero=SCALED.keys_set_to_zero),
        "lfm2": RECURRENT,
        "lfm2moe": RECURRENT,
        "jamba": RECURRENT,
        "nemotron_h": NEMOTRON_H,
        "nemotron_h_moe": NEMOTRON_H,
        "bailingmoe3": RECURRENT,
        "plamo2": dataclasses.replace(RECURRENT, output_node="ffn_residual"),
        "kimi-linear": dataclasses.replace(RECURRENT, needs_head=True),
        "qwen3next": INTERVAL,
        "qwen35": INTERVAL,
        "qwen35moe": INTERVAL,
        # -- several hidden states for each token ------------------------------------------------
        "deepseek4": dataclasses.replace(
            STREAMS,
            output_node="l_last",
            tokens_key="hash_layer_count",
            compressed_everywhere=True,
            rolls_back=False,
        ),
        "hy_v4": STREAMS,
        "glm5-next": dataclasses.replace(STREAMS, recurrent=True, rolls_back=False),
        "qwen4exp": dataclasses.replace(
            STREAMS,
            output_node="l_last",
            recurrent=True,
            rolls_back=False,
            tokens_key="ple.layers",
            keys_of_first="ple.",
        ),
        # -- something repeats, or depends on the number of layers ------------------------------
        "smollm3": ArchitectureRules(step=4),
        "ernie4_5-moe": ArchitectureRules(step_key="interleave_moe_layer_step"),
        "command-r": ArchitectureRules(
            special_layer_counts=_MANY,
            refused_layer_counts=(
                _MANY,
                "llama.cpp norms queries and keys only in a file with 64 layers or more",
            ),
        ),
        # Turned positions with 32 layers, distances with 40, neither with others.
        "baichuan": ArchitectureRules(
            needs_head=True,
            special_layer_counts=frozenset({32, 40}),
            computes_as=((32, "llama"), (40, "refact")),
            ignored=frozenset({"ffn_gate.scale", "ffn_up.scale", "ffn_down.scale"}),
        ),
        # Lite models have whole queries; that and the gate of the experts are written out.
        "deepseek2": ArchitectureRules(special_layer_counts=frozenset({26, 27})),
        "nanbeige": ArchitectureRules(keys_at_most=(("num_loops", 1),)),
        "minimax-01": dataclasses.replace(
            INTERVAL, graph_constants=GraphConstants.DECAY, interval_default=8
        ),
        "mamba": ArchitectureRules(rolls_back=False),
        "mamba2": ArchitectureRules(rolls_back=False),
        "falcon-h1": ArchitectureRules(rolls_back=False),
        **dict.fromkeys(_ONLY_HEAD, HEAD),
        **dict.fromkeys(_PLAIN, PLAIN),
        # -- cannot be cut ----------------------------------------------------------------------
        **dict.fromkeys(
            ["dream", "llada", "llada-moe", "rnd1"], ArchitectureRules(refusal=_DIFFUSION)
        ),
        "kimi-k3": ArchitectureRules(
            refusal="layers read what layers far before them gave, and only the last result goes on"
        ),
        **dict.fromkeys(_ENCODERS, ArchitectureRules(refusal=_ENCODER)),
        **dict.fromkeys(
            ["eagle3", "dflash", "gemma4-assistant"],
            ArchitectureRules(refusal="it only drafts for another model, whose layers it reads"),
        ),
        **dict.fromkeys(
            ["clip", "wavtokenizer-dec"], ArchitectureRules(refusal="it does not write text")
        ),
        **dict.fromkeys(
            ["t5", "t5encoder"],
            ArchitectureRules(refusal="each layer of its decoder reads the result of an encoder"),
        ),
        "gemma3n": ArchitectureRules(
            refusal="each layer looks the tokens up again, and later stages have none"
        ),
        "graniteswitch": ArchitectureRules(
            refusal="a layer behind the others chooses for all of them"
        ),
        "talkie": ArchitectureRules(refusal="each layer adds the model's own input again"),
        "hrm_text": ArchitectureRules(refusal="its layers are passed through several times"),
    }
)

NEXTN_LEFT_OUT: Final = frozenset(
    {
        *("bailingmoe2", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "exaone4"),
        *("glm-dsa", "glm4", "glm4moe", "glm5-next", "hy_v3", "mimo2", "qwen35", "qwen35moe"),
        "qwen3next",
    }
)
"""Layers for multi-token prediction stand behind the others and are left out, as llama.cpp leaves
them out when it writes text; tried for these."""

ARRAYS_NOT_PER_LAYER: Final = frozenset(
    {
        *("rope.dimension_sections", "classifier.output_labels", "ple.layers"),
        *("ple.layer_multipliers", "ple.head_offsets", "ple.head_vocab_sizes"),
    }
)
"""Arrays under the architecture's prefix whose length only by chance equals the layer count."""


def rules_for(model: GgufFile) -> ArchitectureRules:
    """The rules of a model's architecture; raises GgufError (theirs) if it cannot be cut.

    One that is not in the table gets the general rules, with `is_unknown`.
    """
    architecture = model.architecture
    rules = RULES.get(architecture)
    if rules is None:
        has_head = any(tensor.name == "output.weight" for tensor in model.tensors)
        rules = ArchitectureRules(is_unknown=True, needs_head=has_head, rolls_back=False)
    if rules.refusal:
        raise _refused(
            f"architecture {architecture!r} cannot be cut: {rules.refusal}",
            "run it whole on one machine, or use another model",
        )
    for feature in _features_in_the_way(model, rules):
        raise _refused(
            f"the model cannot be cut: it {feature}",
            "use a file of this model without that, or another model",
        )
    return rules


def _features_in_the_way(model: GgufFile, rules: ArchitectureRules) -> Iterator[str]:
    """What a file has, or lacks, that the rules do not cover."""
    architecture = model.architecture
    prefix = f"{architecture}."
    if model.n_nextn and not rules.is_unknown and architecture not in NEXTN_LEFT_OUT:
        yield f"has layers for multi-token prediction ({prefix}nextn_predict_layers)"
    for key, value_max in rules.keys_at_most:
        if model.get_int(prefix + key, 0) > value_max:
            yield f"uses {prefix}{key}"
    for key in sorted(rules.keys_not_zero):
        if model.get_int(prefix + key, 1) == 0:
            yield f"has {prefix}{key} switched off"
    heads = model.metadata.get(f"{prefix}attention.head_count")
    if heads is not None and heads.is_array and not any(heads.items()[:1]):
        # llama.cpp takes the width of all heads from there, and shards begin with other layers.
        yield "has no attention heads in its first layer"
    counts, why = rules.refused_layer_counts
    if model.n_layer in counts and model.get_int("shardmesh.n_shards", 1) == 1:
        yield f"has {model.n_layer} layers: {why}"


def _refused(sentence: str, next_step: str) -> GgufError:
    return GgufError(sentence, code="GGUF_ARCHITECTURE", next_step=next_step)
