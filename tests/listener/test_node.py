"""Which shard a node serves when somebody says so while it is still fetching another."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing
from support.models import BUILT_IN, write_model

from shardmesh.engine.base import EngineOptions
from shardmesh.listener import node as node_module
from shardmesh.listener import supervisor as supervisor_module
from shardmesh.listener.assignment import WantedShard, assign
from shardmesh.listener.local_messages import Start
from shardmesh.listener.node import Node
from shardmesh.listener.node_options import NodeOptions
from shardmesh.shards.layers import ranges_of_counts
from shardmesh.shards.split import split_model
from shardmesh.shards.store import ShardStore
from shardmesh.swarm.admission import Admission
from shardmesh.swarm.identity import new_identity
from shardmesh.swarm.reach import ReachOptions
from shardmesh.swarm.rights import EVERYBODY
from shardmesh.swarm.torrents.options import TorrentOptions


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A listener of shard 0, not on the network, whose shards are all on its disk."""
    model = write_model(tmp_path / "model.gguf", n_layer=2, vocabulary=BUILT_IN)
    folder = tmp_path / "shards"
    split_model(model, ranges_of_counts([1, 1]), folder, name="tiny")
    options = NodeOptions(
        wanted=WantedShard(shard_id=0),
        cluster="test",
        admission=Admission(None),
        rights=EVERYBODY,
        shards_dir=folder,
        state_dir=tmp_path,
        cache_dir=tmp_path,
        bootstraps=(),
        listen_hosts=("127.0.0.1",),
        reach=ReachOptions(),
        port=0,
        data_port=0,
        refresh_interval_s=60.0,
        engine=EngineOptions(),
        log_format="json",
        log_verbosity=0,
        models_dir=None,
        torrents=TorrentOptions(listen_hosts=("127.0.0.1",)),
        fetch_into_shards_dir=True,
        link=None,
    )
    return Node(options, new_identity(), ShardStore(folder))


async def test_the_shard_of_the_start_does_not_take_the_place_of_one_that_was_asked_for(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It came later, since it had to be fetched."""
    has_come = trio.Event()
    provide = node_module.provide_shard

    async def fetch(store: ShardStore, manifest: object, shard_id: int, *rest: object) -> None:
        if shard_id == 0:
            await has_come.wait()
        await provide(store, manifest, shard_id, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(node_module, "provide_shard", fetch)
    monkeypatch.setattr(node_module, "FETCH_PAUSE_S", 0.0)
    manifest = node.store.manifest()
    node.assignment = assign(node.options.wanted, 0, manifest)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.fetch_first_shard)
        await trio.testing.wait_all_tasks_blocked()
        assert await node.load_shard(1) == node.assignment
        has_come.set()
    assert node.assignment.shard_id == 1


async def test_a_node_that_left_its_shard_takes_sessions_at_the_next_one(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Start] = []

    class Child:
        """Notes what it was started with, and loads for ever."""

        pid, n_sessions = None, 0

        def __init__(self, *listeners: object) -> None:
            self.stop = trio.Event().set

        async def run(self, start: Start) -> None:
            started.append(start)
            await trio.sleep_forever()

    monkeypatch.setattr(supervisor_module, "DataChild", Child)
    await node.intend("leaves")
    async with trio.open_nursery() as nursery:
        await node.load_shard(1)
        await node.intend("stays")
        nursery.start_soon(node.supervisor.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert [start.is_draining for start in started] == [False]
