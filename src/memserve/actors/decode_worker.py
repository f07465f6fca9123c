"""The DecodeWorker keeps sequences in its running batch until they end; in role ``both`` it also prefills.

All decisions and their order are in :class:`memserve.engine.worker.WorkerCore`.
"""

from __future__ import annotations

import trio

from memserve.actors.worker import run_worker
from memserve.processes.actor import ActorContext


async def main(context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve as a worker of role ``decode`` or ``both`` until drained."""
    await run_worker(context, task_status)
