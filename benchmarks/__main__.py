"""`python -m benchmarks ...`, which is `shardmesh bench ...`."""

import sys

from shardmesh.cli.main import main

sys.argv.insert(1, "bench")
main()
