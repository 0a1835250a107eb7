"""The last stage hands each token straight to the first, while the coordinator hears of it.

That saves the way over the coordinator.  It is a short cut and nothing more: the coordinator sends
the token as well, so a link that is lost or a token that is not taken changes no text.
"""

from __future__ import annotations

import logging

from shardmesh.errors import ShardmeshError
from shardmesh.links.link import Link
from shardmesh.listener.stage_session import StageSession, Work
from shardmesh.wire.messages import TokenBatch

logger = logging.getLogger(__name__)


def hand_on(work: Work, token: int) -> Link | None:
    """Sends the token that was sampled behind a micro-batch to the first stage; the link, if so.

    In the worker's thread.  Not if a later micro-batch came already, whose sender knew the token or
    guesses it, and not if nothing would have a place behind the token.  Nor what came before a
    repair: its branch is void, though a first stage that has just taken over cannot know it.
    """
    session = work.session
    link, position = session.first_link, work.batch.position + work.batch.n_tokens
    is_last = position + 1 >= session.opened_by.n_ctx
    if link is None or not work.hand or is_last:
        return None
    if work.epoch != session.epoch or session.n_received > position:
        return None
    batch = TokenBatch(
        session=session.session_id,
        epoch=work.epoch,
        position=position,
        tokens=(token,),
        sample=True,
        embed=False,
        branch=work.branch,
        check=b"",
        scored=(),
        hand=True,
    )
    try:
        link.send(batch)
    except ShardmeshError as error:
        give_up(session, error)
        return None
    return link


def give_up(session: StageSession, error: ShardmeshError) -> None:
    """Leaves all tokens of a session to the coordinator until it is repaired, if it ever is."""
    session.first_link = None
    logger.info("tokens of a session go over the coordinator: [%s] %s", error.code, error)
