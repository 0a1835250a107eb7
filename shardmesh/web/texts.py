"""Tokens and templates without generating: `/tokenize`, `/detokenize`, `/apply-template`."""

from __future__ import annotations

import pydantic
import trio
from fastapi import APIRouter

from shardmesh.coordinator.model_files import OpenModel
from shardmesh.coordinator.request import plain_chat
from shardmesh.web.requests import ApplyTemplateBody, DetokenizeBody, TokenizeBody
from shardmesh.web.routes import GatewayOfApp
from shardmesh.web.tools import plan_tools
from shardmesh.web.translate import template_message

router = APIRouter(tags=["text"])


class Tokens(pydantic.BaseModel):
    tokens: list[int]


class Content(pydantic.BaseModel):
    content: str


class Prompt(pydantic.BaseModel):
    prompt: str


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, gateway: GatewayOfApp) -> Tokens:
    """The tokens of a text."""
    async with gateway.coordinator.open_model(body.model) as model:
        return Tokens(tokens=await trio.to_thread.run_sync(_encode, model, body))


@router.post("/detokenize")
async def detokenize(body: DetokenizeBody, gateway: GatewayOfApp) -> Content:
    """The text of tokens; U+FFFD where they are not whole characters."""
    async with gateway.coordinator.open_model(body.model) as model:
        data = await trio.to_thread.run_sync(model.tokenizer.decode, body.tokens)
        return Content(content=data.decode("utf-8", "replace"))


@router.post("/apply-template")
async def apply_template(body: ApplyTemplateBody, gateway: GatewayOfApp) -> Prompt:
    """What a conversation is for the model; without a template, its messages as they are."""
    async with gateway.coordinator.open_model(body.model) as model:
        return Prompt(prompt=await trio.to_thread.run_sync(_render, model, body))


def _encode(model: OpenModel, body: TokenizeBody) -> list[int]:
    return model.tokenizer.encode(
        body.content, add_special=body.add_special, parse_special=body.parse_special
    )


def _render(model: OpenModel, body: ApplyTemplateBody) -> str:
    template = model.tokenizer.chat_template
    tools = plan_tools(body.tools or [], None, template)
    messages = [template_message(message) for message in body.messages]
    if not template:
        return plain_chat(messages)
    return model.render_chat(messages, **tools.variables)
