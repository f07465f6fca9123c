"""Every error that memserve raises on purpose. Anything else that escapes is a bug and ends its process."""

from __future__ import annotations

import attrs


class UserError(Exception):
    """Wrong input from the person at the keyboard: shown as its text alone, exit status 2, no traceback."""


class ConfigError(UserError):
    """A configuration that cannot be used. Its text lists every problem found, one a line."""


class PeerError(Exception):
    """Another actor broke the rules of the bus: unknown kind, wrong version, undecodable body."""


class PeerUnreachable(Exception):
    """There is no connection to the named actor: it never joined, or it is gone."""


class PeerFull(Exception):
    """The queue to the named actor is at its limit; the message was not sent."""


@attrs.frozen
class RequestFailed(Exception):
    """One request ended without its tokens.

    ``code`` is stable and machine-readable; ``status`` is the HTTP status it maps to;
    ``retry_after_s`` is set when the same request may succeed later.
    """

    code: str
    message: str
    status: int = 500
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@attrs.frozen
class PoolError(Exception):
    """A pool call that was refused and changed nothing. ``code`` is one of the constants below."""

    code: str
    message: str

    UNKNOWN_LEASE = "unknown_lease"
    """The lease does not exist: released, expired, or of an earlier incarnation."""
    NOT_OWNER = "not_owner"
    """The lease belongs to another actor."""
    TOO_LARGE = "too_large"
    """More pages than the whole pool has."""
    NO_PAGES = "no_pages"
    """Nothing free and nothing evictable at present."""
    QUEUE_FULL = "queue_full"
    """Too many callers wait for pages already."""
    NOT_CONTIGUOUS = "not_contiguous"
    """An insert that leaves a gap after what the lease has retired."""
    NOT_WHOLE_PAGES = "not_whole_pages"
    """Tokens that do not fill whole pages, or exceed the lease's pages."""

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"
