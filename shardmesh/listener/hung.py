"""Why a data process ends itself: its engine does not come back from a call.  Pure."""

from __future__ import annotations

from shardmesh.engine.grammar import BAD_GRAMMAR, SIMPLER
from shardmesh.engine.watchdog import Call
from shardmesh.errors import EngineError, InputError, ShardmeshError
from shardmesh.listener.stage_session import StageSession


def engine_hung(call: Call) -> EngineError:
    """For whoever has lost the stage, and is not to blame."""
    return EngineError(
        f"llama.cpp did not come back from a call within {call.limit_s:.0f} s",
        code="ENGINE_HUNG",
        next_step="its process is started again by itself; if it hangs again without a grammar, "
        "this machine is too slow for the shard",
    )


def why_hung(call: Call, session: StageSession) -> ShardmeshError:
    """What a session ends with: with a call that is at work on its grammar no replica helps it."""
    sampling = session.opened_by.sampling
    if call.grammar and sampling is not None and sampling.grammar == call.grammar:
        return InputError(
            f"the last stage could not follow the grammar: a step took more than "
            f"{call.limit_s:.0f} s",
            code=BAD_GRAMMAR,
            next_step=SIMPLER,
        )
    return engine_hung(call)
