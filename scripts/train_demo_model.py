"""Train the demo model: a small llama that tells fairy tales.

    pip install 'shardmesh[train]'
    python scripts/train_demo_model.py --corpus fairy-tales.txt --out demo.gguf

The corpus is plain text, one paragraph per line; a short line in capitals starts a new story.
The last 5 % are held out.  Everything that decides the result is in `Recipe`; the run ends by
printing the held-out bits per byte of the weights as they stand in the GGUF (after rounding to
Q8_0), and writes them to a note beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path

import gguf
import tokenizers
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody gives it

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Shape and training of the model; 6.9 M weights, so that Q8_0 stays under 8 MB."""

    n_layer: int = 8
    n_embd: int = 256
    n_ff: int = 704
    n_head: int = 8
    n_head_kv: int = 4
    n_vocab: int = 4096
    n_ctx: int = 512
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    batch_tokens: int = 4_096
    n_steps: int = 2_400
    n_warmup_steps: int = 60
    hidden_lr: float = 0.015  # Muon, for the matrices of the layers
    other_lr: float = 0.003  # AdamW, for the embedding and the norms
    weight_decay: float = 0.1
    dropout: float = 0.1
    seed: int = 7


# -- text ------------------------------------------------------------------------------------


def read_stories(path: Path) -> tuple[str, str]:
    """The corpus as (training text, held-out text), titles replaced by the end-of-text mark."""
    lines = path.read_text(encoding="utf-8").split("\n")
    split_at = int(len(lines) * (1 - HELD_OUT_SHARE))
    return _mark_stories(lines[:split_at]), _mark_stories(lines[split_at:])


def _mark_stories(lines: list[str]) -> str:
    text: list[str] = []
    for line in lines:
        if _is_title(line):
            if text and text[-1] != END_OF_TEXT:
                text.append(END_OF_TEXT)
        elif line.strip():
            text.append(line.strip() + "\n\n")
    return "".join(text)


def _is_title(line: str) -> bool:
    return 3 < len(line.strip()) < 80 and line.strip() == line.strip().upper()


def train_tokenizer(text: str, n_vocab: int) -> tokenizers.Tokenizer:
    """A byte-level BPE that splits words as GPT-2 does, which llama.cpp calls `gpt-2`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer.encode(text).ids, dtype=torch.long)


# -- model -----------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, n_embd: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.epsilon)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on neighbouring pairs, the order that llama.cpp uses for llama models."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Layer(nn.Module):
    def __init__(self, r: Recipe) -> None:
        super().__init__()
        n_head_dim = r.n_embd // r.n_head
        self.recipe = r
        self.attn_norm = RMSNorm(r.n_embd, r.norm_epsilon)
        self.attn_q = nn.Linear(r.n_embd, r.n_embd, bias=False)
        self.attn_k = nn.Linear(r.n_embd, r.n_head_kv * n_head_dim, bias=False)
        self.attn_v = nn.Linear(r.n_embd, r.n_head_kv * n_head_dim, bias=False)
        self.attn_output = nn.Linear(r.n_embd, r.n_embd, bias=False)
        self.ffn_norm = RMSNorm(r.n_embd, r.norm_epsilon)
        self.ffn_gate = nn.Linear(r.n_embd, r.n_ff, bias=False)
        self.ffn_up = nn.Linear(r.n_embd, r.n_ff, bias=False)
        self.ffn_down = nn.Linear(r.n_ff, r.n_embd, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        r = self.recipe
        n_batch, n_tokens, _ = x.shape
        normed = self.attn_norm(x)

        def heads(y: torch.Tensor, n: int) -> torch.Tensor:
            return y.view(n_batch, n_tokens, n, -1).transpose(1, 2)

        q = rotate(heads(self.attn_q(normed), r.n_head), cos, sin)
        k = rotate(heads(self.attn_k(normed), r.n_head_kv), cos, sin)
        v = heads(self.attn_v(normed), r.n_head_kv)
        n_share = r.n_head // r.n_head_kv
        k, v = (y.repeat_interleave(n_share, dim=1) for y in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(n_batch, n_tokens, r.n_embd)
        x = x + F.dropout(self.attn_output(attended), r.dropout, self.training)
        normed = self.ffn_norm(x)
        hidden = F.silu(self.ffn_gate(normed)) * self.ffn_up(normed)
        return x + F.dropout(self.ffn_down(hidden), r.dropout, self.training)


class Model(nn.Module):
    """A llama with tied embeddings; parameters carry the names that GGUF gives them."""

    def __init__(self, r: Recipe) -> None:
        super().__init__()
        self.recipe = r
        self.token_embd = nn.Embedding(r.n_vocab, r.n_embd)
        self.blk = nn.ModuleList(Layer(r) for _ in range(r.n_layer))
        self.output_norm = RMSNorm(r.n_embd, r.norm_epsilon)
        nn.init.normal_(self.token_embd.weight, std=0.02)
        for name, weight in self.blk.named_parameters():
            if weight.ndim == 2:
                std = 0.5 / math.sqrt(weight.shape[1])
                if name.endswith(("attn_output.weight", "ffn_down.weight")):
                    std /= math.sqrt(2 * r.n_layer)
                nn.init.normal_(weight, std=std)
        n_head_dim = r.n_embd // r.n_head
        frequency = r.rope_base ** (-torch.arange(0, n_head_dim, 2).float() / n_head_dim)
        angle = torch.arange(r.n_ctx).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n_batch, n_tokens) ids -> (n_batch, n_tokens, n_vocab) logits."""
        n_tokens = tokens.shape[1]
        x = self.token_embd(tokens)
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        cos, sin = self.cos[:n_tokens].to(x.dtype), self.sin[:n_tokens].to(x.dtype)
        for layer in self.blk:
            x = layer(x, cos, sin)
        return F.linear(self.output_norm(x), self.token_embd.weight)


# -- training --------------------------------------------------------------------------------


def optimizers(model: Model, r: Recipe) -> list[torch.optim.Optimizer]:
    hidden = [p for p in model.blk.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    muon = torch.optim.Muon(hidden, lr=r.hidden_lr, weight_decay=r.weight_decay, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=r.other_lr, weight_decay=0.01, betas=(0.9, 0.98))
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return [muon, adam]


def learning_rate_factor(step: int, r: Recipe) -> float:
    """Linear warm-up, a plateau, then linear to nothing over the last half."""
    warm = min(1.0, (step + 1) / r.n_warmup_steps)
    return warm * min(1.0, 2.0 * (r.n_steps - step) / r.n_steps)


def windows(tokens: torch.Tensor, r: Recipe, generator: torch.Generator):  # type: ignore[no-untyped-def]
    """Endless batches (n_batch, n_ctx + 1), each epoch with its own offset and order."""
    n_batch = r.batch_tokens // r.n_ctx
    while True:
        offset = int(torch.randint(r.n_ctx, (1,), generator=generator))
        n_windows = (len(tokens) - offset - 1) // r.n_ctx
        order = torch.randperm(n_windows, generator=generator)
        for i in range(0, n_windows - n_batch + 1, n_batch):
            starts = offset + order[i : i + n_batch] * r.n_ctx
            yield torch.stack([tokens[s : s + r.n_ctx + 1] for s in starts.tolist()])


def train(model: Model, tokens: torch.Tensor, held_out: Held, checkpoint: Path) -> None:
    r = model.recipe
    optimizer_list = optimizers(model, r)
    batches = windows(tokens, r, torch.Generator().manual_seed(r.seed))
    first_step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizer_list, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first_step = state["step"]
        for _ in range(first_step):
            next(batches)
    started = time.monotonic()
    for step in range(first_step, r.n_steps):
        factor = learning_rate_factor(step, r)
        for optimizer in optimizer_list:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizer_list:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            rate = (step - first_step + 1) * r.batch_tokens / (time.monotonic() - started)
            print(f"step {step} loss {loss.item():.3f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % 200 == 0:
            print(f"step {step + 1} held-out {held_out.bits_per_byte(model):.3f} bpb", flush=True)
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizer_list],
                "step": step + 1,
            }
            torch.save(state, checkpoint)


@dataclasses.dataclass(frozen=True)
class Held:
    """The held-out text: its tokens and its length in bytes."""

    tokens: torch.Tensor
    n_bytes: int

    @torch.no_grad()
    def bits_per_byte(self, model: Model) -> float:
        """Each token predicted once, from half a context or more before it."""
        model.eval()
        n_ctx, total = model.recipe.n_ctx, 0.0
        half = n_ctx // 2
        for start in range(0, len(self.tokens) - 1, half):
            piece = self.tokens[max(0, start - half) : start + half + 1]
            n_new = min(half, len(self.tokens) - 1 - start)
            logits = model(piece[None, :-1])[0, -n_new:].float()
            total += F.cross_entropy(logits, piece[-n_new:], reduction="sum").item()
        model.train()
        return total / math.log(2) / self.n_bytes


# -- GGUF ------------------------------------------------------------------------------------


def write_gguf(model: Model, tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    r = model.recipe
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Shardmesh fairy tales")
    writer.add_description("Writes fairy tales; trained on public-domain books")
    writer.add_license("Apache-2.0")
    writer.add_block_count(r.n_layer)
    writer.add_context_length(r.n_ctx)
    writer.add_embedding_length(r.n_embd)
    writer.add_feed_forward_length(r.n_ff)
    writer.add_head_count(r.n_head)
    writer.add_head_count_kv(r.n_head_kv)
    writer.add_rope_dimension_count(r.n_embd // r.n_head)
    writer.add_rope_freq_base(r.rope_base)
    writer.add_layer_norm_rms_eps(r.norm_epsilon)
    writer.add_vocab_size(r.n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    add_vocabulary(writer, tokenizer, r.n_vocab)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer, n_vocab: int) -> None:
    names = [tokenizer.id_to_token(i) or f"[unused{i}]" for i in range(n_vocab)]
    control = tokenizer.token_to_id(END_OF_TEXT)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i == control else gguf.TokenType.NORMAL for i in range(n_vocab)]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(control)
    writer.add_eos_token_id(control)
    writer.add_add_bos_token(True)


def round_as_written(model: Model, path: Path) -> None:
    """Replaces the weights by what a reader of the GGUF gets."""
    values = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in gguf.GGUFReader(path).tensors
    }
    model.load_state_dict(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("demo.gguf"))
    parser.add_argument("--steps", type=int, default=Recipe.n_steps)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    recipe = dataclasses.replace(Recipe(), n_steps=options.steps)
    torch.set_num_threads(options.threads)
    torch.manual_seed(recipe.seed)
    training_text, held_out_text = read_stories(options.corpus)
    tokenizer = train_tokenizer(training_text, recipe.n_vocab)
    tokens = encode(tokenizer, training_text)
    held_out = Held(
        encode(tokenizer, held_out_text),
        len(held_out_text.replace(END_OF_TEXT, "").encode()),
    )
    model = Model(recipe)
    n_weights = sum(p.numel() for p in model.parameters())
    print(f"{n_weights:,} weights, {len(tokens):,} training tokens", flush=True)
    train(model, tokens, held_out, options.out.with_suffix(".checkpoint"))
    write_gguf(model, tokenizer, options.out)
    round_as_written(model, options.out)
    note = {
        "held_out_bits_per_byte": round(held_out.bits_per_byte(model), 4),
        "n_weights": n_weights,
        "n_training_tokens_in_corpus": len(tokens),
        "recipe": dataclasses.asdict(recipe),
    }
    options.out.with_suffix(".json").write_text(json.dumps(note, indent=2) + "\n")
    print(json.dumps(note), flush=True)


if __name__ == "__main__":
    main()
