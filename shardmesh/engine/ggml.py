"""The functions of ggml that the engine calls on nodes of a graph."""

from __future__ import annotations

import ctypes

from llama_cpp import _ggml

ggml_get_name = _ggml.libggml.ggml_get_name
ggml_get_name.argtypes = [ctypes.c_void_p]
ggml_get_name.restype = ctypes.c_char_p
ggml_nbytes = _ggml.libggml.ggml_nbytes
ggml_nbytes.argtypes = [ctypes.c_void_p]
ggml_nbytes.restype = ctypes.c_size_t
ggml_backend_tensor_get = _ggml.libggml.ggml_backend_tensor_get
ggml_backend_tensor_set = _ggml.libggml.ggml_backend_tensor_set
for _function in (ggml_backend_tensor_get, ggml_backend_tensor_set):
    _function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    _function.restype = None
