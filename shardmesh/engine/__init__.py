"""Computing: the only place that knows llama.cpp."""

from shardmesh.engine.kernel_library import preload

preload()  # before anything here imports llama.cpp
