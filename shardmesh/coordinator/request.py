"""What a user asks of the mesh, checked before anything is sent.  Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardmesh.engine.base import SamplingSettings
from shardmesh.errors import InputError
from shardmesh.wire.commands import InferenceParams
from shardmesh.wire.hidden_states import EXACT, WireType
from shardmesh.wire.limits import PROMPT_BYTES_MAX
from shardmesh.wire.messages import Sampling

N_TOKENS_MAX_DEFAULT = 256

WAIT_S_DEFAULT = 20.0
"""A listener that is started again has loaded a shard of usual size by then."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A prompt as text or tokens, or messages for the model's chat template; and how to go on."""

    prompt: str | None = None
    prompt_tokens: tuple[int, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    template_variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plain_chat: bool = False  # a model without a template gets the messages as they are
    model: str | None = None  # None: the only one that the mesh serves
    adapter: str = ""  # LoRA adapter of the model; empty: none
    n_tokens_max: int = N_TOKENS_MAX_DEFAULT
    given: tuple[int, ...] = ()  # tokens that this very request gave before; only the rest comes
    stop: tuple[str, ...] = ()
    sampling: SamplingSettings = dataclasses.field(default_factory=SamplingSettings)
    ignore_end: bool = False  # go on behind the model's end of text, for measurements
    via: tuple[str, ...] = ()  # nodes that the chain must begin with, by peer id or its end
    avoid: tuple[str, ...] = ()  # nodes that it must never use
    wait_s: float = WAIT_S_DEFAULT  # for a replica in the place of a stage that was lost
    wire: WireType = EXACT  # f16: half the bytes between stages, and not exact
    draft_model: Path | None = None  # a small GGUF model that guesses too, on this machine
    n_drafts: int | None = None  # tokens guessed ahead at most, 0: none; None: as many as pay
    reuse_prefix: bool = True  # begin behind what the stages hold of the prompt, and keep it there
    score_prompt: bool = False  # say how likely each token of the prompt is; all of it is computed
    standby: bool = False  # other replicas keep copies of the KV, to take over quickly
    tenant: str = ""  # for whom a coordinator asks: what they hold is never shared between two

    def __post_init__(self) -> None:
        given = [self.prompt is not None, bool(self.prompt_tokens), bool(self.messages)]
        if sum(given) != 1:
            raise InputError("give either a prompt or messages")
        if self.n_tokens_max < 1:
            raise InputError("at least one token has to be asked for")
        if self.given and len(self.given) >= self.n_tokens_max:
            raise InputError(
                f"{len(self.given)} tokens were given already, {self.n_tokens_max} were asked for"
            )
        if not 0 <= self.wait_s < float("inf"):
            raise InputError(f"a stage cannot be waited for {self.wait_s} s")
        n_bytes = len((self.prompt or "").encode("utf-8", "surrogatepass"))
        if n_bytes > PROMPT_BYTES_MAX:
            raise InputError(
                f"the prompt has {n_bytes} bytes, {PROMPT_BYTES_MAX} are allowed",
                code="PROMPT_TOO_LONG",
            )


def request_of_command(params: InferenceParams, *, fresh_seed: int) -> CompletionRequest:
    """The request in an INFERENCE command; `fresh_seed` is used if it names none."""
    names = {field.name for field in dataclasses.fields(SamplingSettings)}
    given = {name: value for name in names if (value := getattr(params, name)) is not None}
    return CompletionRequest(
        prompt=params.prompt,
        messages=tuple({"role": m.role, "content": m.content} for m in params.messages),
        model=params.model,
        n_tokens_max=params.max_tokens,
        stop=params.stop,
        sampling=SamplingSettings(**{"seed": fresh_seed, **given}),
        reuse_prefix=False,  # all members ask the same listener, and it cannot tell them apart
    )


def plain_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages for a model that was never taught to chat: their texts, to be gone on with."""
    return "\n\n".join(str(message.get("content") or "") for message in messages)


def sampling_message(settings: SamplingSettings) -> Sampling:
    """The settings as they travel to the last stage."""
    return Sampling(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)})


def uses_history(settings: SamplingSettings) -> bool:
    """Whether the sampler looks back at the prompt."""
    return (
        settings.repeat_penalty != 1.0
        or settings.frequency_penalty != 0.0
        or settings.presence_penalty != 0.0
    )


def context_needed(n_prompt: int, n_tokens_max: int, n_ctx: int) -> int:
    """Tokens of context to reserve, as many as there are at most.

    Raises InputError (theirs) if the prompt leaves no room for a single token, where one is wanted.
    """
    if n_prompt == 0:
        raise InputError("the prompt is empty", next_step="give some text to go on from")
    if n_prompt + min(n_tokens_max, 1) > n_ctx:
        raise InputError(
            f"the prompt has {n_prompt} tokens, the mesh has a context of {n_ctx}",
            code="PROMPT_TOO_LONG",
            next_step="shorten the prompt, or start the listeners with a larger --ctx-size",
        )
    return min(n_prompt + n_tokens_max, n_ctx)
