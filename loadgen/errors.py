"""Errors that a user of the load generator can fix."""

from __future__ import annotations


class LoadgenError(Exception):
    """A wrong option, file or run directory; the text names the problem, the value, and a valid one."""
