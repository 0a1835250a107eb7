"""Writes docs/architectures.md from the table of rules; behind `make docs/architectures.md`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shardmesh.shards.architecture_rules import ArchitectureRules
from shardmesh.shards.architectures import NEXTN_LEFT_OUT, RULES

TARGET = Path(__file__).resolve().parent.parent / "docs" / "architectures.md"

HEAD = """\
# Architectures

Generated from `shardmesh/shards/architectures.py` by `make docs/architectures.md`; change it there.

`shardmesh split` cuts a model only if chains of its shards compute the same bits as the whole
model. Each architecture below that can be cut was compared on a small random model of it: whole
against every legal cut into two and one into three, over a prefill of 48 tokens, past the small
model's sliding window of 32, and single steps after it. `make archs` repeats that; its first run
downloads and builds llama.cpp's own test program. Two exceptions of this proof: the windows of
`llama4` and `smallthinker` are fixed in llama.cpp at thousands of tokens, so the comparison does
not reach past them.

An architecture that is in neither list gets the general rules, and `shardmesh split` tries first
whether they are enough: the model whole and cut if there is memory for it, else a shorter one of
its first layers. It is refused if a single bit differs or llama.cpp ends the process. Models for
images or sound are cut in their language part only.

The columns. **Wire**: how hidden states travel; `f32` everywhere, as anything shorter changes bits
(`--wire f16` gives up exactness for half the bytes, with any architecture).
**Roll-back**: whether a sequence can be taken back to an earlier token, which prefix reuse, drafts
and parts of recovery need. The manifest says the same (`can_roll_back`), so that a coordinator does
without them; a stage that is asked all the same answers `CANNOT_TRIM`. **MTP**: layers for
multi-token prediction (`nextn_predict_layers`) are left out of the shards, as llama.cpp leaves them
out when it writes text; other models with such layers are refused.

| Architecture | Legal cuts | Wire | Roll-back | MTP | Notes |
|---|---|---|---|---|---|
"""

REFUSED = """
## Refused

| Architecture | Why |
|---|---|
"""


def document() -> str:
    good = [f"| `{name}` | {' | '.join(columns(name, rules))} |\n" for name, rules in listed(False)]
    refused = [f"| `{name}` | {rules.refusal} |\n" for name, rules in listed(True)]
    return HEAD + "".join(good) + REFUSED + "".join(refused)


def columns(name: str, rules: ArchitectureRules) -> tuple[str, ...]:
    roll_back = "yes" if rules.rolls_back else "no"
    nextn = "left out" if name in NEXTN_LEFT_OUT else ""
    return cuts(rules), "`f32`", roll_back, nextn, notes(rules)


def listed(is_refused: bool) -> Iterator[tuple[str, ArchitectureRules]]:
    return (item for item in sorted(RULES.items()) if bool(item[1].refusal) == is_refused)


def cuts(rules: ArchitectureRules) -> str:
    """Where a cut is legal, in words."""
    parts = []
    if rules.step > 1:
        parts.append(f"after every {rules.step} layers")
    if rules.step_key:
        parts.append(f"after every `{rules.step_key}` layers")
    if rules.whole_step_everywhere:
        parts.append(f"each shard has {rules.step} layers or more")
    if rules.compressed_everywhere:
        parts.append("each shard has a layer of each compression of the model")
    if rules.tokens_key:
        parts.append(f"the layers of `{rules.tokens_key}` are in the first shard")
    if rules.recurrent:
        parts.append("each shard has an attention and a recurrent layer")
    if rules.window_everywhere:
        parts.append("each shard has a layer with a window, if the model has any")
    if rules.full_everywhere:
        parts.append("each shard has a layer without a window, if the model has any")
    if rules.special_layer_counts:
        parts.append(
            f"no shard has {numbers(rules.special_layer_counts)} layers, unless the model has"
        )
    return "; ".join(parts) or "anywhere"


def notes(rules: ArchitectureRules) -> str:
    """What the slicer or the engine does for it, and what it does not take."""
    parts = [rules.note] if rules.note else []
    if rules.streams_key:
        parts.append("all hidden states of a token go on, side by side")
    elif rules.input_node:
        parts.append("hidden states are put in behind what llama.cpp does to its input")
    if rules.keys_set_to_zero:
        parts.append("the scale of the input is switched off after the first shard")
    if rules.window:
        parts.append("the pattern of windows is written out")
    if rules.writes_recurrent:
        parts.append("the recurrent layers are written out")
    if rules.needs_head:
        parts.append("`output.weight` in each shard, zeros except in the last")
    refused, why = rules.refused_layer_counts
    if refused:
        parts.append(f"models of {numbers(refused)} layers are refused: {why}")
    for key, value_max in rules.keys_at_most:
        if value_max:
            parts.append(f"refused with `{key}` above {value_max}")
    parts += [f"refused with `{key}` 0" for key in sorted(rules.keys_not_zero)]
    if rules.graph_constants is not None:
        parts.append("a number that llama.cpp derives from the layers is set in its graph")
    parts += [
        f"shards of a model of {count} layers are files of `{other}`"
        for count, other in rules.computes_as
    ]
    return "; ".join(parts)


def numbers(values: frozenset[int]) -> str:
    """`26, 27 or 47`; a long run by its start."""
    ordered = sorted(values)
    if len(ordered) > 10:
        return f"{ordered[0]} or more"
    *before, last = map(str, ordered)
    return f"{', '.join(before)} or {last}" if before else last


if __name__ == "__main__":
    TARGET.write_text(document())
