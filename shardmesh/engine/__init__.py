"""Computing: the only place that knows llama.cpp."""

from shardmesh.engine import kernels

kernels.preload()  # before anything here imports llama.cpp
