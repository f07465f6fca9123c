"""How an actor belongs to its cluster: what it says of itself, and of others of its host that have died."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import UNSET, UnsetType

from memserve.actions import Send
from memserve.actors.loop import Shell
from memserve.bus import Link
from memserve.config import Resolved
from memserve.messages import Ended, Member
from memserve.processes.actor import ActorContext
from memserve.processes.lifecycle import WORKER_KINDS
from memserve.scheduling.presence import Presence, seed_id
from memserve.scheduling.terms import Terms


def introduce(context: ActorContext, link: Link, role: str = "") -> Presence:
    """This actor's presence, with a way to every scheduler."""
    resolved = context.resolved
    schedulers = resolved.config.scheduler_names
    for name in schedulers:
        link.connect(seed_id(name), context.scheduler(name))
    me = Member(
        context.id,
        context.kind,
        link.endpoint,
        os.getpid(),
        "starting",
        role,
        role_configured=role,
        joined=context.name in resolved.joined,
        host=host_of(resolved),
    )
    return Presence(me, tuple(seed_id(name) for name in schedulers), terms=terms_of(resolved))


def host_of(resolved: Resolved) -> str:
    """This host's address where there are others."""
    return resolved.network.address if resolved.network else ""


def terms_of(resolved: Resolved) -> Terms | UnsetType:
    """What all hosts must agree on, as this one has it. Reads the model's files, unless they were read before."""
    if resolved.network is None:
        return UNSET
    from memserve.engine.weights import content_digest

    config = resolved.config
    return {
        "model.path": f"content {content_digest(Path(resolved.model_path))}",
        "model.dtype": config.model.dtype,
        "model.weights": config.model.stored,
        "model.max_context": f"{resolved.max_context} tokens",
        "pool.page_tokens": str(config.pool.page_tokens),
        "cache.mode": config.cache.mode,
    }


async def pass_on_deaths(context: ActorContext, shell: Shell) -> None:
    """Tell the scheduler of another host who has died on this one, by its supervisor's word; and, last, that we end ourselves.

    Where the scheduler is on this host, its supervisor tells it.
    """
    network = context.resolved.network
    if network is None or not network.joins:
        return
    try:
        async for actor in context.lifeline.died:
            tell_schedulers(context, shell, Ended((actor,)))
    finally:
        # A worker that leaves in order is told of by its shard, which would kill it if it heard so before.
        if context.kind not in WORKER_KINDS or context.lifeline.gone.is_set():
            tell_schedulers(context, shell, Ended((context.id,)))


def tell_schedulers(context: ActorContext, shell: Shell, message: Ended) -> None:
    """Send a message to every scheduler."""
    for name in context.resolved.config.scheduler_names:
        shell.send(Send(seed_id(name), message))
