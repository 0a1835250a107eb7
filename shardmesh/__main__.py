"""`python -m shardmesh` is the `shardmesh` command."""

from shardmesh.cli.main import main

main()
