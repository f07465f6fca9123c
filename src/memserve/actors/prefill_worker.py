"""The PrefillWorker: runs prompts, draws the first token, hands the sequence and its lease to a decode worker.

What happens, in what order, is decided in :class:`memserve.engine.worker.WorkerCore`.
"""

from __future__ import annotations

import trio

from memserve.actors.worker import run_worker
from memserve.processes.actor import ActorContext


async def main(context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None:
    """Serve as worker of role ``prefill`` until drained."""
    await run_worker(context, task_status)
