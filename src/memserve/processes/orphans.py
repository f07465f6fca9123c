"""Ends what actors leave behind: processes that they had started, a compiler for example.

A supervisor is the reaper of its descendants (PR_SET_CHILD_SUBREAPER, see :mod:`memserve.processes.zygote`):
what an actor had started becomes the supervisor's child when the actor ends. Nobody wants its result then. A
compiler that ran on would write to the file that the successor's compiler writes, and each that ends would
stay as a zombie until the supervisor ends.

A supervisor that is the first process of a container gets the orphans of everybody: those that no actor began
are left alone. What actors begin has their environment, with the cluster's runtime directory in it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Set
from pathlib import Path

import attrs
import structlog
import trio

log = structlog.get_logger()

BEGUN_BY = "MEMSERVE_BEGUN_BY"
"""Environment variable of actors and of what they begin: the cluster's runtime directory."""

END_S = 2.0
"""Longest wait for the orphans' ends; those that an unfinished system call keeps are tried again later."""


def children() -> set[int]:
    """The process ids of the calling thread's children, ended ones included, until they are waited for.

    Empty where the kernel has no such list (it is built with CONFIG_PROC_CHILDREN almost everywhere). The
    kernel gives orphans to the main thread, so call it there.
    """
    try:
        return set(map(int, Path("/proc/thread-self/children").read_text().split()))
    except OSError:
        return set()


@attrs.define
class Orphans:
    """Children of this process that it did not start, but an actor of one cluster did."""

    runtime_dir: Path
    """The cluster's."""
    _older: frozenset[int] = attrs.field(init=False, factory=lambda: frozenset(children()))
    """The children when this was made: they are not orphans of actors."""

    async def end(self, ours: Set[int]) -> None:
        """Kill and wait for every orphan: a child neither in ``ours`` nor older than this object.

        The children of an orphan become this process's own when it ends, and are then ended as well.
        """
        with trio.move_on_after(END_S, shield=True):
            while orphans := set(filter(self._begun_by_an_actor, children() - self._older - ours)):
                for pid in orphans:
                    try:
                        await _end(pid)
                    except OSError as error:  # out of descriptors, perhaps
                        log.warning("orphan not ended", child_pid=pid, reason=str(error))
                        return

    def _begun_by_an_actor(self, pid: int) -> bool:
        """Also true of a process that has ended: it has no environment, and must be waited for in any case."""
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except PermissionError:
            return False  # another user's
        except OSError:
            return True  # it has ended
        return not environment or os.fsencode(f"{BEGUN_BY}={self.runtime_dir}") in environment.split(b"\0")


async def _end(pid: int) -> None:
    """Kill a child and wait for it. Raises OSError."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await trio.lowlevel.wait_readable(pidfd)
        _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 - it has ended
    finally:
        os.close(pidfd)
    log.warning("orphan ended", child_pid=pid, returncode=os.waitstatus_to_exitcode(status))
