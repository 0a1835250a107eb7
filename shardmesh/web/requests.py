"""What clients send, with every bound; the names are OpenAI's, some llama-server's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from shardmesh.wire.limits import (
    CHAT_MESSAGES_MAX,
    CHOICES_MAX,
    EMBEDDING_TEXTS_MAX,
    GRAMMAR_BYTES_MAX,
    LOGIT_BIASES_MAX,
    MODEL_NAME_BYTES_MAX,
    PROMPT_BYTES_MAX,
    STOP_STRINGS_MAX,
    TOOLS_MAX,
)

TOP_LOGPROBS_OFFERED_MAX = 20
"""As OpenAI has it."""

PRIORITY_MAX = 10
TOKENS_ASKED_MAX = 2**31 - 1

Text = Annotated[str, Field(max_length=PROMPT_BYTES_MAX)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=PROMPT_BYTES_MAX)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Schema = Annotated[dict[str, Any], Field(max_length=1024)]


class Strict(pydantic.BaseModel):
    """Base: no text for a number, no NaN.  Fields that are not known are left alone."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(Strict):
    """What a stream brings besides text."""

    include_usage: bool = False


class SamplingFields(Strict):
    """How tokens are chosen; what is left out is llama.cpp's default."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    repeat_last_n: Annotated[int, Field(ge=0, le=4096)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern="^[0-9]{1,9}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=LOGIT_BIASES_MAX),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(max_length=GRAMMAR_BYTES_MAX)] | None = Field(
        None, description="A grammar in GBNF that the answer must follow."
    )


def _each_text(given: str | Sequence[int | str | list[int]]) -> list[str | list[int]]:
    """Texts or tokens of them, of which there may be one or several."""
    if isinstance(given, str):
        return [given]
    tokens = [each for each in given if isinstance(each, int)]
    return [tokens] if tokens else [each for each in given if not isinstance(each, int)]


class GenerationRequest(SamplingFields):
    """What both completions share."""

    model: Annotated[str, Field(max_length=MODEL_NAME_BYTES_MAX)] | None = Field(
        None, description="May be left out if the mesh serves only one."
    )
    max_tokens: Annotated[int, Field(ge=1, le=TOKENS_ASKED_MAX)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOP_STRINGS_MAX)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=CHOICES_MAX)] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    priority: Annotated[int, Field(ge=-PRIORITY_MAX, le=PRIORITY_MAX)] = Field(
        0, description="Lower ones have their turn first when requests wait."
    )
    ignore_eos: bool = Field(False, description="Go on behind the model's end of text.")

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(GenerationRequest):
    """The body of `/v1/completions`."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=CHOICES_MAX)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=CHOICES_MAX)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=TOKENS_ASKED_MAX)] | None = Field(
        None, description="0 with `echo` only: nothing but the prompt is wanted."
    )
    echo: bool | None = Field(
        None, description="The prompt comes first; its tokens are in `logprobs`, too."
    )
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_OFFERED_MAX)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        return _each_text(self.prompt)


class TextPart(Strict):
    """A part of a message; images and sound are refused."""

    type: Literal["text"]
    text: Text


class FunctionCall(Strict):
    """A call that the model made earlier."""

    name: Annotated[str, Field(max_length=256)]
    arguments: Text


class ToolCall(Strict):
    id: Annotated[str, Field(max_length=256)] = ""
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[TextPart], Field(max_length=CHAT_MESSAGES_MAX)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=TOOLS_MAX)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None


class FunctionDefinition(Strict):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    name: Annotated[str, Field(max_length=64)]


class NamedTool(Strict):
    """Asks for a call of this function."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    name: Annotated[str, Field(max_length=256)] = ""
    description: Text | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class ChatBody(GenerationRequest):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=CHAT_MESSAGES_MAX)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=TOKENS_ASKED_MAX)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS_OFFERED_MAX)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class EmbeddingBody(Strict):
    """The body of `/v1/embeddings`."""

    model: Annotated[str, Field(max_length=MODEL_NAME_BYTES_MAX)] | None = None
    input: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=EMBEDDING_TEXTS_MAX)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=EMBEDDING_TEXTS_MAX)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        return _each_text(self.input)


class TokenizeBody(Strict):
    """The body of `/tokenize`."""

    model: Annotated[str, Field(max_length=MODEL_NAME_BYTES_MAX)] | None = None
    content: Text
    add_special: bool = False
    parse_special: bool = True


class DetokenizeBody(Strict):
    """The body of `/detokenize`."""

    model: Annotated[str, Field(max_length=MODEL_NAME_BYTES_MAX)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=PROMPT_BYTES_MAX)]


class ApplyTemplateBody(Strict):
    """The body of `/apply-template`."""

    model: Annotated[str, Field(max_length=MODEL_NAME_BYTES_MAX)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=CHAT_MESSAGES_MAX)]
    tools: Annotated[list[Tool], Field(max_length=TOOLS_MAX)] | None = None
