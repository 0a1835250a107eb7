"""From a client's request to the coordinator's.  Pure."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from shardmesh.coordinator.request import CompletionRequest
from shardmesh.engine.base import SamplingSettings
from shardmesh.engine.sampling import SEED_MAX
from shardmesh.errors import InputError
from shardmesh.web.grammars import JSON_OBJECT_GRAMMAR, grammar_of_schema
from shardmesh.web.requests import (
    ChatBody,
    CompletionBody,
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
    Message,
    SamplingFields,
    TextPart,
)
from shardmesh.web.tools import ToolPlan, plan_tools
from shardmesh.wire.limits import CHOICES_MAX

COMPLETION_TOKENS_DEFAULT = 16
"""OpenAI's; a chat goes on until its end, or until the context is full."""

_WITHOUT_END = 2**31 - 1
_PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repeat_penalty",
    "repeat_last_n",
    "frequency_penalty",
    "presence_penalty",
)


def sampling_of(
    body: SamplingFields, fresh_seed: int, *, n_top_logprobs: int, grammar: str = ""
) -> SamplingSettings:
    """The settings of a request; `fresh_seed` is used if it names none."""
    given = {name: getattr(body, name) for name in _PLAIN_FIELDS}
    seed = fresh_seed if body.seed is None else body.seed
    return SamplingSettings(
        **{name: value for name, value in given.items() if value is not None},
        seed=seed % (SEED_MAX + 1),
        logit_bias=tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items()),
        n_top_logprobs=n_top_logprobs,
        grammar=grammar,
    )


def completion_requests(
    body: CompletionBody, fresh_seed: int, caller: str = ""
) -> list[CompletionRequest]:
    """A request for each choice, prompt by prompt; raises InputError (theirs)."""
    if body.max_tokens == 0 and not body.echo:
        raise InputError("`max_tokens` of 0 leaves nothing to answer without `echo`")
    n_tokens_max = COMPLETION_TOKENS_DEFAULT if body.max_tokens is None else body.max_tokens
    sampling = sampling_of(
        body, fresh_seed, n_top_logprobs=body.logprobs or 0, grammar=body.grammar or ""
    )
    requests: list[CompletionRequest] = []
    for prompt in body.prompts:
        base = CompletionRequest(
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_tokens=() if isinstance(prompt, str) else tuple(prompt),
            model=body.model,
            n_tokens_max=max(1, n_tokens_max),
            stop=body.stops,
            sampling=sampling,
            ignore_end=body.ignore_eos,
            score_prompt=bool(body.echo) and body.logprobs is not None,
            tenant=caller,
        )
        requests += _choices(base, body, len(requests))
    if len(requests) > CHOICES_MAX:
        raise InputError(f"prompts times `n` are {len(requests)}; {CHOICES_MAX} are allowed")
    return requests


def chat_requests(
    body: ChatBody, fresh_seed: int, template: str | None, caller: str = ""
) -> tuple[list[CompletionRequest], ToolPlan]:
    """A request for each choice, and how tool calls look; raises InputError (theirs)."""
    if body.top_logprobs and not body.logprobs:
        raise InputError("`top_logprobs` needs `logprobs` to be true")
    tools = plan_tools(body.tools or [], body.tool_choice, template)
    base = CompletionRequest(
        messages=tuple(template_message(message) for message in body.messages),
        template_variables=tools.variables,
        plain_chat=True,
        model=body.model,
        n_tokens_max=body.max_completion_tokens or body.max_tokens or _WITHOUT_END,
        stop=body.stops,
        sampling=sampling_of(
            body,
            fresh_seed,
            n_top_logprobs=body.top_logprobs or 0,
            grammar=_chat_grammar(body, tools),
        ),
        ignore_end=body.ignore_eos,
        tenant=caller,
    )
    return _choices(base, body, 0), tools


def _choices(
    base: CompletionRequest, body: GenerationRequest, n_before: int
) -> list[CompletionRequest]:
    """`n` times the same, each with a seed of its own."""
    seed = base.sampling.seed
    return [
        dataclasses.replace(
            base,
            sampling=dataclasses.replace(
                base.sampling, seed=(seed + n_before + number) % (SEED_MAX + 1)
            ),
        )
        for number in range(body.n or 1)
    ]


def _chat_grammar(body: ChatBody, tools: ToolPlan) -> str:
    """At most one thing may say what the answer has to look like."""
    wanted = [body.grammar, tools.grammar]
    match body.response_format:
        case JsonObjectFormat():
            wanted.append(JSON_OBJECT_GRAMMAR)
        case JsonSchemaFormat(json_schema=described):
            wanted.append(grammar_of_schema(described.schema_ or {}))
    given = [grammar for grammar in wanted if grammar]
    if len(given) > 1:
        raise InputError("`grammar`, `response_format` and a required tool exclude each other")
    return given[0] if given else ""


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    known: dict[str, Any] = {"role": message.role, "content": text_of(message.content)}
    if message.name is not None:
        known["name"] = message.name
    if message.tool_call_id is not None:
        known["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        known["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return known


def text_of(content: str | list[TextPart] | None) -> str:
    """The text of a message, its parts one below the other."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _arguments(text: str) -> Any:
    """Templates write the arguments as JSON themselves, so they want the value."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
