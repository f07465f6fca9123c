"""Taking connections: neither their number nor an error that passes may end a process that has pages or streams."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
import trio

log = structlog.get_logger()

Connection = TypeVar("Connection")

PAUSE_S = 0.1
"""Pause after a connection could not be accepted."""
PASSING = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS,
    errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET,
    errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH,
)  # fmt: skip
"""Errors of accept() that say nothing about the listener: no resources for another connection, which then stays
in the backlog, or an error of the connection itself (accept(2))."""
KEPT = 8
"""Accepted connections leave one in so many descriptors free. ZeroMQ aborts the process if it has no
descriptor for a connection to a Unix socket: another actor's, whenever that one is restarted."""


async def accepted(accept: Callable[[], Awaitable[Connection]]) -> Connection:
    """The next connection from ``accept``, which is called again after an error that passes.

    It is called only while enough descriptors are left for other purposes; until then connections wait in the
    backlog. Its other errors are raised. An error of a library counts as the OSError that caused it.
    """
    reported = False
    while True:
        try:
            _check_descriptors()
            return await accept()
        except Exception as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in PASSING:
                raise
            if not reported:  # once: it may last, and a log of every attempt would fill the disk
                log.warning("connection not accepted yet", reason=str(cause))
                reported = True
            await trio.sleep(PAUSE_S)


def _check_descriptors() -> None:
    """Raise OSError (EMFILE) if an accepted connection would take one of the descriptors that must stay free."""
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(lowest_free)
    if lowest_free >= most - most // KEPT:
        raise OSError(errno.EMFILE, f"{lowest_free} of {most} descriptors are in use")
