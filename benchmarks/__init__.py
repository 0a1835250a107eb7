"""How fast a mesh is beside llama.cpp alone: `shardmesh bench --help`."""
