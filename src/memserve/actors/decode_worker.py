"""The DecodeWorker: keeps sequences in its running batch until they end. With role ``both`` it prefills them too.

What happens, in what order, is decided in :class:`memserve.engine.worker.WorkerCore`.
"""

from __future__ import annotations

import trio

from memserve.actors.worker import run_worker
from memserve.processes.actor import ActorContext


async def main(context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve as worker of role ``decode`` or ``both`` until drained."""
    await run_worker(context, task_status)
