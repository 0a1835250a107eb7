"""The JSON commands that a listener answers."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import psutil
import trio

import shardmesh
from shardmesh.coordinator.coordinator import Coordinator
from shardmesh.coordinator.generate import Finished, Piece
from shardmesh.coordinator.request import request_of_command
from shardmesh.errors import UnreachableError
from shardmesh.listener.local_messages import LinkState
from shardmesh.listener.node import Node
from shardmesh.swarm.host import Host
from shardmesh.wire.commands import InferenceParams, LoadShardParams, NoParams
from shardmesh.wire.limits import INFERENCE_TIMEOUT_S, LOAD_TIMEOUT_S

LIST_TIMEOUT_S = 5.0
"""For hashing files that have just come; those that take longer are left out."""

Handler = Callable[[Any], Awaitable[object]]


@dataclasses.dataclass
class CommandCounters:
    """Requests of one kind since the start."""

    n_requests: int = 0
    n_succeeded: int = 0
    total_ms: float = 0.0

    def report(self) -> dict[str, float]:
        """Counts, success rate and mean latency."""
        n = max(1, self.n_requests)
        return {
            "n_requests": self.n_requests,
            "n_succeeded": self.n_succeeded,
            "success_rate": round(self.n_succeeded / n, 4),
            "latency_ms": round(self.total_ms / n, 3),
        }


class NodeCommands:
    """Handlers by command name, each counted and timed."""

    def __init__(self, node: Node, host: Host, coordinator: Coordinator) -> None:
        self._node = node
        self._host = host
        self._coordinator = coordinator
        self._counters: dict[str, CommandCounters] = {}
        self._started_s = time.monotonic()

    def handlers(self) -> Mapping[str, Handler]:
        """What `swarm.commands.serve_commands` takes."""
        known: dict[str, Handler] = {
            "GET_CAPABILITIES": self._get_capabilities,
            "LOAD_SHARD": self._load_shard,
            "UNLOAD_SHARD": self._unload_shard,
            "DRAIN": self._drain,
            "INFERENCE": self._inference,
            "LIST_FILES": self._list_files,
            "GET_METRICS": self._get_metrics,
        }
        return {name: self._counted(name, handler) for name, handler in known.items()}

    def _counted(self, name: str, handler: Handler) -> Handler:
        counters = self._counters.setdefault(name, CommandCounters())

        async def run(params: Any) -> object:
            counters.n_requests += 1
            started_s = time.monotonic()
            try:
                data = await handler(params)
            finally:
                counters.total_ms += (time.monotonic() - started_s) * 1e3
            counters.n_succeeded += 1
            return data

        return run

    async def _get_capabilities(self, params: NoParams) -> object:
        offer = self._node.offer()
        fields = {f.name: getattr(offer, f.name) for f in dataclasses.fields(offer)}
        capabilities = {
            name: getattr(offer.capabilities, name) for name in offer.capabilities.__struct_fields__
        }
        return {
            **fields,
            "capabilities": capabilities,
            "peer_id": self._host.peer_id,
            "cluster": self._node.options.cluster,
            "addresses": self._host.addresses(),
            "shard_state": self._node.shard_state,
            "version": shardmesh.__version__,
        }

    async def _load_shard(self, params: LoadShardParams) -> object:
        self._node.was_told = True
        with trio.move_on_after(LOAD_TIMEOUT_S) as scope:
            loaded = await self._node.load_shard(params.shard_id, params.model)
        if scope.cancelled_caught:
            raise UnreachableError(
                f"shard {params.shard_id} is still being fetched",
                code="STILL_FETCHING",
                next_step="it goes on; GET_METRICS shows how far it is.  Send LOAD_SHARD again "
                "once it is there",
            )
        ready = await self._node.supervisor.wait_loaded(LOAD_TIMEOUT_S)
        return {
            "shard_id": loaded.shard_id,
            "layer_start": loaded.layer_start,
            "layer_end": loaded.layer_end,
            "model_name": loaded.model_name,
            "n_ctx": ready.n_ctx,
            "shard_loaded": True,
        }

    async def _unload_shard(self, params: NoParams) -> object:
        self._node.unload_shard()
        return {"shard_loaded": False}

    async def _drain(self, params: NoParams) -> object:
        await self._node.drain()
        return {"draining": True, "n_sessions": self._node.load.n_sessions}

    async def _inference(self, params: InferenceParams) -> object:
        request = request_of_command(params, fresh_seed=secrets.randbits(32))
        texts: list[str] = []
        tokens: list[dict[str, object]] = []
        finished: Finished | None = None
        try:
            with trio.fail_after(INFERENCE_TIMEOUT_S):
                async with self._coordinator.complete(request) as completion:
                    async for item in completion.items:
                        if isinstance(item, Piece):
                            texts.append(item.text)
                            if item.token is not None:
                                tokens.append(_token_report(item))
                        else:
                            finished = item
        except trio.TooSlowError:
            raise UnreachableError(
                f"the answer took more than {INFERENCE_TIMEOUT_S:.0f} s",
                next_step="ask for fewer tokens",
            ) from None
        if finished is None:
            raise UnreachableError("the generation ended too early")
        timings = finished.timings
        return {
            "text": "".join(texts),
            "finish_reason": finished.reason,
            "model": completion.chain.stages[0].model_name,
            "seed": request.sampling.seed,
            "n_prompt_tokens": completion.n_prompt_tokens,
            "n_tokens": timings.n_tokens,
            "tokens": tokens if request.sampling.n_top_logprobs else [],
            "first_token_ms": round(timings.first_token_s * 1e3, 3),
            "total_ms": round(timings.total_s * 1e3, 3),
            "chain": [stage.peer_id for stage in completion.chain.stages],
        }

    async def _list_files(self, params: NoParams) -> object:
        files = self._node.files
        if files is None:
            return {"files": []}
        with trio.move_on_after(LIST_TIMEOUT_S):  # a large file may still be hashed
            await files.wait_given()
        return {"files": [dataclasses.asdict(report) for report in files.files()]}

    async def _get_metrics(self, params: object) -> object:
        supervisor = self._node.supervisor
        status = supervisor.status
        files = self._node.files
        stage = await supervisor.metrics()
        return {
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "shard_state": self._node.shard_state,
            "shard_error": str(status.error) if status.error else None,
            "n_data_process_restarts": supervisor.n_restarts,
            "control_memory_bytes": psutil.Process().memory_info().rss,
            "data_memory_bytes": stage.memory_bytes if stage else 0,
            "n_sessions": stage.n_sessions if stage else 0,
            "n_sessions_coordinated": self._coordinator.n_sessions,
            "stage": stage.counters if stage else {},
            "downloads": [dataclasses.asdict(d) for d in files.downloads()] if files else [],
            "torrents": dataclasses.asdict(files.seeding()) if files else {},
            "links": [self._link_report(link) for link in stage.links] if stage else [],
            "n_nodes_refused": dict(self._host.admission.n_refused),
            "n_announcements_refused": self._node.n_announcements_refused(),
            "commands": {name: c.report() for name, c in self._counters.items()},
        }

    def _link_report(self, link: LinkState) -> dict[str, object]:
        """A link of the data process, with what only this one knows: whether a relay carries it."""
        through_relay = link.kind == "stream" and self._host.is_relayed(link.peer_id)
        return {
            "peer_id": link.peer_id,
            "kind": "relayed" if through_relay else link.kind,
            "round_trip_ms": round(link.round_trip_us / 1e3, 3),
        }


def _token_report(piece: Piece) -> dict[str, object]:
    token = piece.token
    if token is None:
        return {}
    return {
        "token": token.token,
        "logprob": token.logprob,
        "top_logprobs": [list(pair) for pair in token.top_logprobs],
    }
