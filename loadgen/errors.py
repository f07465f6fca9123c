"""What a user of the load generator can repair."""

from __future__ import annotations


class LoadgenError(Exception):
    """A wrong option, file or run directory; the text names what is wrong, the value, and what would do."""
