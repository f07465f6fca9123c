"""The GlobalScheduler hears from all actors, places every request and announces deaths.

It is bound at a well-known address, given by its name, so that all other actors find it at start and find its
successor again.
"""

from __future__ import annotations

import os

import trio

from memserve.actions import Died
from memserve.actors.loop import Shell
from memserve.actors.membership import host_of, terms_of
from memserve.bus import open_link
from memserve.config import Config
from memserve.identity import actor_name
from memserve.messages import Member
from memserve.processes.actor import ActorContext
from memserve.scheduling.admission import Admission
from memserve.scheduling.global_tree import GlobalTree
from memserve.scheduling.index_feed import IndexFeed
from memserve.scheduling.policies import PLAIN, Policy
from memserve.scheduling.pricing import Cost, Weights
from memserve.scheduling.roles import Prices, Roles
from memserve.scheduling.scheduler import SchedulerCore
from memserve.scheduling.ttl_index import TtlIndex


async def main(context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None:
    """Schedule until drained; by then the supervisor has drained all other actors."""
    endpoint = context.scheduler(context.name)
    resolved = context.resolved
    async with open_link(context.id, endpoint, context.keys) as link:
        me = Member(context.id, context.kind, endpoint, os.getpid(), "ready", host=host_of(resolved))
        core = make_core(me, resolved.config)
        core.terms = terms_of(resolved)
        shell = Shell(core, link)
        async with trio.open_nursery() as nursery:
            await nursery.start(shell.run)
            nursery.start_soon(_announce_deaths, context, shell)
            task_status.started()
            await context.lifeline.drain.wait()
            nursery.cancel_scope.cancel()


def make_core(me: Member, config: Config) -> SchedulerCore:
    """The scheduler's core as configured."""
    settings = config.scheduler
    admission = Admission(settings.held_max)
    return SchedulerCore(
        me,
        settings.policy,
        make_policy(config),
        make_index(config),
        admission,
        settings.hold_back_s,
        make_roles(config, actor_name(me.id)),
    )


def make_roles(config: Config, name: str) -> Roles:
    """The role decider as configured; of several schedulers, only the first changes roles."""
    auto = config.scheduler.roles == "auto" and name == config.scheduler_names[0]
    return Roles(auto, Prices(config.scheduler.ttft_weight))


def make_policy(config: Config) -> Policy:
    """The configured placement policy."""
    settings = config.scheduler
    if settings.policy != "cost":
        return PLAIN[settings.policy]()
    margin_s = settings.handoff_margin_ms / 1e3
    return Cost(
        Weights(
            settings.ttft_weight,
            settings.others_weight,
            margin_s,
            config.pages_move,
            config.transfer_path,
            config.far_path,
        )
    )


def make_index(config: Config) -> IndexFeed | TtlIndex:
    """The scheduler's index of which prefixes are cached on which shard."""
    tree = GlobalTree(config.pool.page_tokens)
    if config.scheduler.index == "ttl":
        return TtlIndex(tree, config.scheduler.index_ttl_s)
    return IndexFeed(tree)


async def _announce_deaths(context: ActorContext, shell: Shell) -> None:
    async for actor in context.lifeline.died:
        shell.tell(Died(actor))
