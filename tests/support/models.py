"""Small synthetic GGUF models with real vocabularies: true architectures, random weights.

Weights are drawn so that a token's logits are far apart (no degenerate ties) and the same arguments
always give the same bytes.  The GGUF is put together here by hand, not by the code under test.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

VOCABULARY_DIR = Path(__file__).resolve().parents[3] / "shared" / "vocab"
BUILT_IN = "built-in"
ARCHITECTURES = ("llama", "mixtral", "mistral", "qwen2", "qwen3", "phi3")
WEIGHT_TYPES = ("f32", "f16", "q8_0", "q4_k")
USUAL_VOCABULARY = {
    "llama": "llama-bpe",
    "mixtral": "llama-spm",
    "mistral": "llama-spm",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "phi3": "phi-3",
}

_F32, _F16, _Q8_0, _Q4_K = 0, 1, 8, 12
_TYPE_NUMBER = {"f32": _F32, "f16": _F16, "q8_0": _Q8_0, "q4_k": _Q4_K}
_FILE_TYPE = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k": 15}
_U32, _F32_VALUE, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_I32 = 5
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_ALIGNMENT = 32
_LORA_RANK = 4
_HEAD_GAIN = 3.0  # deviation of a logit


@dataclasses.dataclass(frozen=True)
class TensorData:
    """A tensor to write: ggml order of dimensions, ggml type number, encoded values."""

    name: str
    shape: tuple[int, ...]  # ggml order
    ggml_type: int
    data: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """The numbers of one synthetic model."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_embd_head: int
    n_expert: int
    tied: bool
    rope_tensors: bool


def vocabulary_note() -> str:
    """One line for the head of a test report: which vocabularies are used."""
    if VOCABULARY_DIR.is_dir():
        return f"vocabularies: real ones from {VOCABULARY_DIR.name}/"
    return "vocabularies: folder shared/vocab is missing, using the small built-in tokenizer"


def write_model(
    path: Path,
    architecture: str = "llama",
    *,
    n_layer: int = 4,
    weights: str = "f32",
    vocabulary: str | None = None,
    n_embd: int | None = None,
    tied: bool = False,
    rope_tensors: bool = False,
    sliding_window: int = 0,
    n_ctx_train: int = 512,
    name: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes one model and returns `path`.

    `architecture` is one of ARCHITECTURES (mixtral and mistral are GGUF "llama"), `weights` one of
    WEIGHT_TYPES, `vocabulary` the middle of a file name of shared/vocab or BUILT_IN (None: the
    architecture's usual one).  `tied` leaves out output.weight, `rope_tensors` adds rope_freqs or
    rope_factors_* (llama.cpp takes them for the llama kinds and phi3 only).
    """
    if rope_tensors and architecture.startswith("qwen"):
        raise ValueError(f"{architecture} has no rope tensors")
    gguf_architecture = "llama" if architecture in ("mixtral", "mistral") else architecture
    tokenizer, n_vocab = tokenizer_metadata(vocabulary or USUAL_VOCABULARY[architecture])
    width = n_embd or (256 if weights == "q4_k" else 64)
    shape = _Shape(
        n_layer=n_layer,
        n_embd=width,
        n_ff=2 * width,
        n_head=4,
        n_head_kv=4 if architecture == "phi3" else 2,
        n_embd_head=width // 2 if architecture in ("mistral", "qwen3") else width // 4,
        n_expert=4 if architecture == "mixtral" else 0,
        tied=tied,
        rope_tensors=rope_tensors,
    )
    metadata = _metadata(gguf_architecture, shape, n_vocab, n_ctx_train, weights)
    metadata["general.name"] = string_value(name or f"synthetic {architecture}")
    if sliding_window:
        metadata[f"{gguf_architecture}.attention.sliding_window"] = u32_value(sliding_window)
    generator = np.random.default_rng([seed, n_layer, ARCHITECTURES.index(architecture)])
    tensors = _tensors(architecture, shape, n_vocab, _Drawer(generator, weights))
    write_gguf(path, {**metadata, **tokenizer}, list(tensors))
    return path


def write_lora(
    path: Path,
    architecture: str,
    weights: Sequence[tuple[str, int, int]],
    *,
    seed: int = 1,
    deviation: float = 0.1,
) -> Path:
    """Writes a LoRA adapter for weights, each (name, columns, rows), and returns `path`."""
    generator = np.random.default_rng(seed)
    metadata = {
        "general.architecture": string_value(architecture),
        "general.type": string_value("adapter"),
        "adapter.type": string_value("lora"),
        "adapter.lora.alpha": f32_value(8.0),
    }
    tensors = []
    for name, n_columns, n_rows in weights:
        for end, shape in (("a", (n_columns, _LORA_RANK)), ("b", (_LORA_RANK, n_rows))):
            values = generator.normal(0.0, deviation, shape[0] * shape[1]).astype(np.float32)
            tensors.append(TensorData(f"{name}.lora_{end}", shape, _F32, values.tobytes()))
    write_gguf(path, metadata, tensors)
    return path


def write_gguf(path: Path, metadata: dict[str, bytes], tensors: Sequence[TensorData]) -> None:
    """A GGUF v3 file of encoded metadata values (type number and value) and tensors."""
    head = bytearray(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += bare_string(key) + value
    offset = 0
    for tensor in tensors:
        head += bare_string(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        head += struct.pack("<IQ", tensor.ggml_type, offset)
        offset += len(_padded(tensor.data))
    with path.open("wb") as file:
        file.write(_padded(bytes(head)))
        for tensor in tensors:
            file.write(_padded(tensor.data))


# -- vocabulary --------------------------------------------------------------------------------


@functools.cache
def tokenizer_metadata(vocabulary: str) -> tuple[dict[str, bytes], int]:
    """The encoded tokenizer.* values of a vocabulary and its number of tokens."""
    path = VOCABULARY_DIR / f"ggml-vocab-{vocabulary}.gguf"
    if vocabulary == BUILT_IN or not path.is_file():
        return _built_in_tokenizer()
    values = {k: v for k, v in raw_metadata(path.read_bytes()) if k.startswith("tokenizer.")}
    n_vocab = struct.unpack_from("<Q", values["tokenizer.ggml.tokens"], 8)[0]
    return values, n_vocab


def raw_metadata(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Key and encoded value of each metadata entry of a well-formed GGUF file."""
    n_values = struct.unpack_from("<Q", data, 16)[0]
    at = 24
    for _ in range(n_values):
        n_key = struct.unpack_from("<Q", data, at)[0]
        key = data[at + 8 : at + 8 + n_key].decode()
        at += 8 + n_key
        end = _value_end(data, at)
        yield key, data[at:end]
        at = end


def _value_end(data: bytes, at: int) -> int:
    kind = struct.unpack_from("<I", data, at)[0]
    n_items, at = 1, at + 4
    if kind == _ARRAY:
        kind, n_items = struct.unpack_from("<IQ", data, at)
        at += 12
    if kind != _STRING:
        return int(at + n_items * _SCALAR_BYTES[kind])
    for _ in range(n_items):
        at += 8 + struct.unpack_from("<Q", data, at)[0]
    return at


def _built_in_tokenizer() -> tuple[dict[str, bytes], int]:
    """A SentencePiece-like vocabulary: bytes, letters and a few words."""
    # llama.cpp looks up the fourth in every model whose name contains "phi3".
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", *"etaoinshrdlucmfwypvbgkqjxz", "▁the", "▁and", "▁a", "in", "er", "▁once"]
    tokens = special + byte_tokens + words
    kinds = [2, 3, 3, 3] + [6] * 256 + [1] * len(words)
    scores = [0.0] * 260 + [-float(i) for i in range(len(words))]
    values = {
        "tokenizer.ggml.model": string_value("llama"),
        "tokenizer.ggml.pre": string_value("default"),
        "tokenizer.ggml.tokens": array_value(_STRING, [bare_string(token) for token in tokens]),
        "tokenizer.ggml.scores": array_value(_F32_VALUE, [struct.pack("<f", s) for s in scores]),
        "tokenizer.ggml.token_type": array_value(_I32, [struct.pack("<i", k) for k in kinds]),
        "tokenizer.ggml.bos_token_id": u32_value(1),
        "tokenizer.ggml.eos_token_id": u32_value(2),
        "tokenizer.ggml.unknown_token_id": u32_value(0),
        "tokenizer.ggml.add_bos_token": struct.pack("<I?", _BOOL, True),
        "tokenizer.chat_template": string_value(
            "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        ),
    }
    return values, len(tokens)


# -- metadata ----------------------------------------------------------------------------------


def _metadata(
    architecture: str, shape: _Shape, n_vocab: int, n_ctx_train: int, weights: str
) -> dict[str, bytes]:
    own = {
        "block_count": u32_value(shape.n_layer),
        "context_length": u32_value(n_ctx_train),
        "embedding_length": u32_value(shape.n_embd),
        # An array per layer, as models with uneven layers have it: the cut must follow.
        "feed_forward_length": array_value(_U32, [struct.pack("<I", shape.n_ff)] * shape.n_layer),
        "attention.head_count": u32_value(shape.n_head),
        "attention.head_count_kv": u32_value(shape.n_head_kv),
        "attention.key_length": u32_value(shape.n_embd_head),
        "attention.value_length": u32_value(shape.n_embd_head),
        "attention.layer_norm_rms_epsilon": f32_value(1e-5),
        "rope.dimension_count": u32_value(shape.n_embd_head),
        "rope.freq_base": f32_value(10000.0),
        "vocab_size": u32_value(n_vocab),
    }
    if architecture == "phi3":
        own["rope.scaling.original_context_length"] = u32_value(n_ctx_train)
    if shape.n_expert:
        own["expert_count"] = u32_value(shape.n_expert)
        own["expert_used_count"] = u32_value(2)
    values = {"general.architecture": string_value(architecture)}
    values |= {f"{architecture}.{key}": value for key, value in own.items()}
    values["general.file_type"] = u32_value(_FILE_TYPE[weights])
    values["general.quantization_version"] = u32_value(2)
    return values


def bare_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def string_value(text: str) -> bytes:
    return struct.pack("<I", _STRING) + bare_string(text)


def u32_value(value: int) -> bytes:
    return struct.pack("<II", _U32, value)


def f32_value(value: float) -> bytes:
    return struct.pack("<If", _F32_VALUE, value)


def array_value(kind: int, items: Sequence[bytes]) -> bytes:
    return struct.pack("<IIQ", _ARRAY, kind, len(items)) + b"".join(items)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


# -- tensors -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Drawer:
    """Draws named tensors; matrices keep the size of what they multiply, times `gain`."""

    generator: np.random.Generator
    weights: str

    def matrix(self, name: str, *dimensions: int, gain: float = 1.0) -> TensorData:
        deviation = gain / math.sqrt(dimensions[0])
        data = _random_weights(self.generator, dimensions, self.weights, deviation)
        return TensorData(f"{name}.weight", dimensions, _TYPE_NUMBER[self.weights], data)

    def plain(self, name: str, *dimensions: int, mean: float, deviation: float) -> TensorData:
        values = self.generator.normal(mean, deviation, math.prod(dimensions))
        return TensorData(name, dimensions, _F32, values.astype(np.float32).tobytes())

    def norm(self, name: str, n: int) -> TensorData:
        return self.plain(f"{name}.weight", n, mean=1.0, deviation=0.1)


def _tensors(architecture: str, shape: _Shape, n_vocab: int, draw: _Drawer) -> Iterator[TensorData]:
    # A tied embedding as large as what the layers add would only ever repeat its own token.
    gain = _HEAD_GAIN if shape.tied else math.sqrt(shape.n_embd)
    yield draw.matrix("token_embd", shape.n_embd, n_vocab, gain=gain)
    yield draw.norm("output_norm", shape.n_embd)
    if not shape.tied:
        yield draw.matrix("output", shape.n_embd, n_vocab, gain=_HEAD_GAIN)
    if shape.rope_tensors:
        names = ("rope_factors_long", "rope_factors_short")
        for name in names if architecture == "phi3" else ("rope_freqs",):
            n = shape.n_embd_head // 2
            yield draw.plain(f"{name}.weight", n, mean=1.5, deviation=0.2)
    for layer in range(shape.n_layer):
        yield from _attention_tensors(architecture, f"blk.{layer}", shape, draw)
        yield from _feed_forward_tensors(architecture, f"blk.{layer}", shape, draw)


def _attention_tensors(
    architecture: str, block: str, shape: _Shape, draw: _Drawer
) -> Iterator[TensorData]:
    n_q = shape.n_head * shape.n_embd_head
    n_kv = shape.n_head_kv * shape.n_embd_head
    yield draw.norm(f"{block}.attn_norm", shape.n_embd)
    if architecture == "phi3":
        yield draw.matrix(f"{block}.attn_qkv", shape.n_embd, n_q + 2 * n_kv)
    else:
        for letter, n in (("q", n_q), ("k", n_kv), ("v", n_kv)):
            yield draw.matrix(f"{block}.attn_{letter}", shape.n_embd, n)
            if architecture == "qwen2":
                yield draw.plain(f"{block}.attn_{letter}.bias", n, mean=0.0, deviation=0.3)
    if architecture == "qwen3":
        yield draw.norm(f"{block}.attn_q_norm", shape.n_embd_head)
        yield draw.norm(f"{block}.attn_k_norm", shape.n_embd_head)
    yield draw.matrix(f"{block}.attn_output", n_q, shape.n_embd)


def _feed_forward_tensors(
    architecture: str, block: str, shape: _Shape, draw: _Drawer
) -> Iterator[TensorData]:
    n_in, n_ff, n_expert = shape.n_embd, shape.n_ff, shape.n_expert
    yield draw.norm(f"{block}.ffn_norm", n_in)
    if architecture == "phi3":  # gate and up in one
        yield draw.matrix(f"{block}.ffn_up", n_in, 2 * n_ff)
        yield draw.matrix(f"{block}.ffn_down", n_ff, n_in)
    elif n_expert:
        router = f"{block}.ffn_gate_inp.weight"
        yield draw.plain(router, n_in, n_expert, mean=0.0, deviation=0.3)
        yield draw.matrix(f"{block}.ffn_gate_exps", n_in, n_ff, n_expert)
        yield draw.matrix(f"{block}.ffn_down_exps", n_ff, n_in, n_expert)
        yield draw.matrix(f"{block}.ffn_up_exps", n_in, n_ff, n_expert)
    else:
        yield draw.matrix(f"{block}.ffn_gate", n_in, n_ff)
        yield draw.matrix(f"{block}.ffn_down", n_ff, n_in)
        yield draw.matrix(f"{block}.ffn_up", n_in, n_ff)


def _random_weights(
    generator: np.random.Generator, dimensions: tuple[int, ...], weights: str, deviation: float
) -> bytes:
    """Random weights of one matrix with the given standard deviation, encoded."""
    n_values = math.prod(dimensions)
    if weights == "q4_k":
        return _random_q4_k(generator, n_values // 256, deviation)
    if weights == "q8_0":
        return _random_q8_0(generator, n_values // 32, deviation)
    values: npt.NDArray[np.float32] = generator.standard_normal(n_values, np.float32)
    values *= np.float32(deviation)
    return values.astype(np.float16).tobytes() if weights == "f16" else values.tobytes()


def _random_q8_0(generator: np.random.Generator, n_blocks: int, deviation: float) -> bytes:
    """Blocks of one f16 scale and 32 signed bytes, which are even (deviation 73)."""
    blocks = np.empty(n_blocks, dtype=[("d", "<f2"), ("qs", "i1", 32)])
    blocks["d"] = generator.uniform(0.5, 1.5, n_blocks) * deviation / 73
    blocks["qs"] = generator.integers(-127, 128, (n_blocks, 32), np.int8)
    return blocks.tobytes()


def _random_q4_k(generator: np.random.Generator, n_blocks: int, deviation: float) -> bytes:
    """Superblocks of 256: d, dmin, twelve bytes of 6-bit scales and minima, 128 of nibbles.

    A value is d*scale*nibble - dmin*minimum; with dmin = 7.5 d the mean is 0 and the deviation
    about 250 d.
    """
    blocks = np.empty(n_blocks, dtype=[("d", "<f2"), ("dmin", "<f2"), ("rest", "u1", 140)])
    blocks["d"] = generator.uniform(0.7, 1.3, n_blocks) * deviation / 250
    blocks["dmin"] = blocks["d"].astype(np.float32) * 7.5
    blocks["rest"] = generator.integers(0, 256, (n_blocks, 140), np.uint8)
    return blocks.tobytes()
