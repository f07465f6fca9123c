"""The GlobalScheduler: hears from everyone, places every request, announces the dead.

It is bound at a well-known address, its name's, so that all others find it at start and find its successor again.
"""

from __future__ import annotations

import os

import trio

from memserve.actions import Died
from memserve.actors.loop import Shell
from memserve.bus import open_link
from memserve.messages import Member
from memserve.process import ActorContext
from memserve.scheduling.policies import POLICIES
from memserve.scheduling.scheduler import SchedulerCore


async def main(context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None:
    """Schedule until told to drain; by then the supervisor has drained everyone else."""
    endpoint = context.place.endpoint(context.name)
    policy = context.resolved.config.scheduler.policy
    async with open_link(context.id, endpoint) as link:
        me = Member(context.id, context.kind, endpoint, os.getpid(), "ready")
        shell = Shell(SchedulerCore(me, policy, POLICIES[policy]()), link)
        async with trio.open_nursery() as nursery:
            await nursery.start(shell.run)
            nursery.start_soon(_announce_deaths, context, shell)
            task_status.started()
            await context.lifeline.drain.wait()
            nursery.cancel_scope.cancel()


async def _announce_deaths(context: ActorContext, shell: Shell) -> None:
    async for actor in context.lifeline.died:
        shell.tell(Died(actor))
