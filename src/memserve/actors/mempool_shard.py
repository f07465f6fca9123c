"""The MemPoolShard: owns one arena of KV pages, says whose each page is, and hands the arena's memory to workers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

import structlog
import trio

from memserve.actions import Kill
from memserve.actors.loop import Shell
from memserve.actors.worker import introduce
from memserve.bus import open_link
from memserve.kernels.arena import Arena, serve_arena
from memserve.mempool.addresses import Home
from memserve.mempool.pool import Pool
from memserve.mempool.shard import ShardCore
from memserve.messages import actor_name
from memserve.process import ActorContext
from memserve.scheduling.presence import Reporting

log = structlog.get_logger()

KILL_S = 1.0
"""Longest wait for a killed process to be gone; it takes microseconds unless the kernel is in trouble."""


async def main(context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve pool calls until told to drain; by then the supervisor has drained the workers."""
    resolved = context.resolved
    pages = resolved.shard_pages[context.name]
    async with open_link(context.id, context.place.endpoint(context.id)) as link:
        presence = introduce(context, link)
        config = resolved.config
        caching = config.cache.mode != "off"
        home = Home([shard.name for shard in config.shard].index(context.name), int(context.incarnation, 16))
        pool = Pool(pages, config.pool.page_tokens, config.pool.lease_s, caching=caching, home=home)
        core = ShardCore(pool)
        shell = Shell(Reporting(core, presence), link)
        shell.perform[Kill] = fence
        async with trio.open_nursery() as nursery:
            await nursery.start(shell.run)
            # Prefaulting takes a second a GiB: in a thread, while heartbeats go out.
            arena = await trio.to_thread.run_sync(Arena.create, context.id, pages, resolved.page_bytes)
            await nursery.start(serve_arena, arena, context.place.socket_path(f"{context.id}.arena"))
            log.info("arena ready", pages=pages, bytes=pages * resolved.page_bytes)
            presence.become("ready")
            shell.turn()
            task_status.started()
            await context.lifeline.drain.wait()
            nursery.cancel_scope.cancel()
        arena.close()
        core.check()


def fence(kill: Kill) -> None:
    """Kill a worker that is held for dead, if it still exists, and wait until it is gone (SIGKILL ends a stopped one too)."""
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(kill.pid)
        try:
            words = Path(f"/proc/{kill.pid}/cmdline").read_bytes().split(b"\0")
            if os.fsencode(actor_name(kill.actor)) in words:  # not another process that was given its number
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], KILL_S)
                log.warning("worker fenced off", worker=kill.actor, worker_pid=kill.pid)
        except FileNotFoundError:
            pass  # it ended between the two look-ups
        finally:
            os.close(process)
