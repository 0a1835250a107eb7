"""How fast a mesh is beside llama.cpp alone: `python -m benchmarks --help`."""
