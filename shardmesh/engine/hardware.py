"""What llama.cpp can use on this machine."""

from __future__ import annotations

from llama_cpp import llama_cpp as api


def gpu_available() -> bool:
    """Whether this build of llama.cpp can put layers on a GPU."""
    return bool(api.llama_supports_gpu_offload())
