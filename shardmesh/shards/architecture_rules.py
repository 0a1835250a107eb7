"""What can be special about an architecture when a model is cut."""

from __future__ import annotations

import dataclasses
import enum


class GraphConstants(enum.Enum):
    """Which numbers `engine.graph_constants` computes."""

    QUERY_SCALE = enum.auto()  # by the width of all heads or of one
    RESIDUAL_SCALE = enum.auto()  # by the root of the number of layers
    DECAY = enum.auto()  # of a recurrent layer, by its place among all


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowPattern:
    """Which layers see only a window when the file does not list them: llama.cpp's own default.

    Of `period` layers one sees everything: the last, or the first with `full_first`.
    """

    period: int
    full_first: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArchitectureRules:
    """What differs from the general rules."""

    note: str = ""
    """For people: which models these are, or what is special."""

    refusal: str = ""
    """Why it cannot be cut; a sentence's end."""

    is_unknown: bool = False
    """Not in the table: such a model is cut only after it was proven to stay exact."""

    rolls_back: bool = True
    """A sequence can be taken back to an earlier token."""

    keys_at_most: tuple[tuple[str, int], ...] = ()
    """Keys (without the architecture) whose feature the cut does not handle beyond this value."""

    keys_not_zero: frozenset[str] = frozenset()
    """Keys that switch a feature on or off at 0, and off cannot be cut."""

    keys_set_to_zero: frozenset[str] = frozenset()
    """Scales of the input, which 0 switches off on later stages."""

    needs_head: bool = False
    """llama.cpp wants `output.weight` in each file and does not fall back to the embedding."""

    input_node: str = ""
    """llama.cpp does something to its input (scales it, norms it, adds positions) even if that is
    hidden states: the engine puts them into this node of the graph, behind all that."""

    input_tensor: str = ""
    """`input_node` is there only in files with this tensor."""

    fed_as_tokens: bool = False
    """llama.cpp takes hidden states for an image and computes otherwise: later stages get token 0
    and the hidden states in `input_node`."""

    output_node: str = "l_out"
    """The node with the hidden states behind a layer."""

    streams_key: str = ""
    """A token has several hidden states side by side, which all go on; the key says how many."""

    tokens_key: str = ""
    """Some layers look the tokens up, which only the first stage has; the key lists them, or says
    how many of the first ones do."""

    keys_of_first: str = ""
    """The beginning of keys that only the first shard has."""

    window: WindowPattern | None = None
    """Counted from the first layer of a file: written out as a list, so that a cut can be
    anywhere."""

    window_everywhere: bool = False
    """llama.cpp aborts when a file has no layer with a window."""

    full_everywhere: bool = False
    """... and when it has no layer without one."""

    compressed_everywhere: bool = False
    """... and when it lacks one of the compressions (`attention.compress_ratios`) of the model."""

    recurrent: bool = False
    """Attention and recurrent layers alternate: each shard needs one of each."""

    writes_recurrent: bool = False
    """Which are recurrent follows from an interval: written out as a list."""

    interval_default: int = 4
    """That interval in files without one."""

    one_part_a_layer: bool = False
    """A layer with a feed-forward part has neither attention nor recurrence."""

    step: int = 1
    """Something repeats every so many layers, counted from the first of a file, and no key
    tells where it starts: a cut is legal only there."""

    whole_step_everywhere: bool = False
    """llama.cpp aborts when a file does not have all layers of a step."""

    step_key: str = ""
    """A key that holds a further such step."""

    special_layer_counts: frozenset[int] = frozenset()
    """llama.cpp computes differently when a file has exactly so many layers: a shard of a model
    that has another number must not."""

    refused_layer_counts: tuple[frozenset[int], str] = (frozenset(), "")
    """Models of so many layers cannot be cut, and why: what llama.cpp does with these it does with
    no other number."""

    computes_as: tuple[tuple[int, str], ...] = ()
    """Number of layers of the whole model, and another architecture that computes the same as
    llama.cpp does for just this number: its shards are files of that."""

    ignored: frozenset[str] = frozenset()
    """Tensors of a layer that llama.cpp does not use, but would in such files."""

    graph_constants: GraphConstants | None = None
    """Numbers in llama.cpp's graph that follow from the number of layers: the engine sets them."""
