"""How an actor registers with its cluster, and how deaths on its host reach schedulers on other hosts."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import UNSET, UnsetType

from memserve.actions import Send
from memserve.actors.loop import Shell
from memserve.bus import Link
from memserve.config import Resolved
from memserve.messages import Ended, Member
from memserve.presence import Presence, seed_id
from memserve.processes.actor import ActorContext
from memserve.processes.lifecycle import WORKER_KINDS
from memserve.scheduling.terms import Terms


def introduce(context: ActorContext, link: Link, role: str = "") -> Presence:
    """This actor's presence, after connecting the link to every scheduler."""
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
    """This host's address in a cluster of several hosts; otherwise empty."""
    return resolved.network.address if resolved.network else ""


def terms_of(resolved: Resolved) -> Terms | UnsetType:
    """This host's values of the settings that all hosts must agree on.

    Reads the model's files if they are not read yet.
    """
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
    """Report deaths on this host, and at last its own end, to schedulers on another host.

    The supervisor announces the deaths. Where the scheduler is on this host, it announces them there
    directly.
    """
    network = context.resolved.network
    if network is None or not network.joins:
        return
    try:
        async for actor in context.lifeline.died:
            tell_schedulers(context, shell, Ended((actor,)))
    finally:
        # A worker that leaves in order is reported by its shard. If the worker reported itself, the shard
        # would hear of it while the worker still exists, and kill it.
        if context.kind not in WORKER_KINDS or context.lifeline.gone.is_set():
            tell_schedulers(context, shell, Ended((context.id,)))


def tell_schedulers(context: ActorContext, shell: Shell, message: Ended) -> None:
    """Send ``message`` to every scheduler."""
    for name in context.resolved.config.scheduler_names:
        shell.send(Send(seed_id(name), message))
