"""Taking connections: some errors of accept() pass, and none of these may end a process that has pages or streams."""

from __future__ import annotations

import errno
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


async def accepted(accept: Callable[[], Awaitable[Connection]]) -> Connection:
    """The next connection from ``accept``, which is called again after an error that passes.

    Raises its other errors. An error of a library counts as the OSError that caused it.
    """
    reported = False
    while True:
        try:
            return await accept()
        except Exception as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError) or cause.errno not in PASSING:
                raise
            if not reported:  # once: it may last, and a log of every attempt would fill the disk
                log.warning("connection not accepted yet", reason=str(cause))
                reported = True
            await trio.sleep(PAUSE_S)
