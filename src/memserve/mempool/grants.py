"""The grants that a pool makes, what it takes back, and its counters."""

from __future__ import annotations

import attrs

from memserve.identity import ActorId


@attrs.frozen
class Grant:
    """A lease. Page ``pages[i]`` holds the tokens from ``i * page_tokens`` on.

    The first ``cached_tokens`` tokens are filled.
    """

    lease: int
    pages: tuple[int, ...]
    """Pages as slots."""
    cached_tokens: int
    ready: bool = True
    """False while pages are brought in: :meth:`Pool.settle` returns the lease's grant once they are there."""
    found_pages: tuple[int, ...] = (0, 0, 0)
    """Number of cached pages by the tier in which they were found."""


@attrs.frozen
class Reclaimed:
    """What was taken back from an owner whose leases have ended."""

    owner: ActorId
    leases: int
    pages: int
    """Pages that came free; retired pages stay in the index."""


@attrs.define
class Counters:
    """Running totals since the shard started."""

    requested_tokens: int = 0
    """Prompt tokens of all granted acquires and matches."""
    matched_tokens: int = 0
    """Requested tokens that were cached."""
    matched_host_tokens: int = 0
    """Cached tokens that were found in host memory."""
    matched_disk_tokens: int = 0
    inserted_pages: int = 0
    duplicate_pages: int = 0
    """Retired pages whose tokens the index already had in other pages."""
    skipped_pages: int = 0
    """Retired pages that were not indexed because caching is off."""
    deleted_pages: int = 0
    reclaimed_pages: int = 0
    """Pages freed by leases that ended because their owner died or fell silent."""
    expired_leases: int = 0
    handed_over_pages: int = 0
