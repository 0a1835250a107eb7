"""The demo model with a chat template, which it was never taught."""

from __future__ import annotations

from pathlib import Path

from shardmesh.demo_model import DEMO_MODEL
from shardmesh.shards.gguf_check import read_gguf
from shardmesh.shards.gguf_values import string
from shardmesh.shards.gguf_write import write_contents
from shardmesh.shards.slices import FileContents, ShardTensor

TOOL_TEMPLATE = """\
{%- if tools %}Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Call one as <tool_call>
{"name": ..., "arguments": ...}
</tool_call>
{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}result of {{ message.tool_call_id }}: {{ message.content }}
{% else %}{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}assistant:{% endif %}"""
"""In the manner of Hermes and Qwen, short enough for a context of 512 tokens."""


def write_templated(path: Path, template: str = TOOL_TEMPLATE) -> Path:
    """Writes the demo model with this chat template to `path`, which it returns."""
    source = read_gguf(DEMO_MODEL)
    metadata = {**source.metadata, "tokenizer.chat_template": string(template)}
    tensors = tuple(
        ShardTensor(t.name, t.shape, t.ggml_type, t.n_bytes, source=t) for t in source.tensors
    )
    with path.open("wb") as file:
        write_contents(file, FileContents(metadata, tensors))
    return path
