"""What a pool hands out, takes back and counts."""

from __future__ import annotations

import attrs

from memserve.identity import ActorId


@attrs.frozen
class Grant:
    """A lease. ``pages[i]`` holds tokens ``i * page_tokens`` onwards; the first ``cached_tokens`` are filled."""

    lease: int
    pages: tuple[int, ...]
    """Slots."""
    cached_tokens: int
    ready: bool = True
    """False while pages are brought in: :meth:`Pool.settle` says when they are there."""
    found_pages: tuple[int, ...] = (0, 0, 0)
    """The cached ones, by the tier in which they were found."""


@attrs.frozen
class Reclaimed:
    """What an owner left behind."""

    owner: ActorId
    leases: int
    pages: int
    """Pages that came free; the retired ones stay in the index."""


@attrs.define
class Counters:
    """Running totals since the shard started."""

    requested_tokens: int = 0
    """Prompt tokens of all granted acquires."""
    matched_tokens: int = 0
    """Those of them that were cached."""
    matched_host_tokens: int = 0
    """Those of the cached ones that were in host memory."""
    matched_disk_tokens: int = 0
    inserted_pages: int = 0
    duplicate_pages: int = 0
    """Retired pages whose tokens the index had in other pages."""
    skipped_pages: int = 0
    """Retired pages that were not indexed because caching is off."""
    deleted_pages: int = 0
    reclaimed_pages: int = 0
    """Pages of leases that ended because their owner died or fell silent."""
    expired_leases: int = 0
    handed_over_pages: int = 0
    handed_over_bytes_copied: int = 0
    """Bytes of KV moved by hand-overs.

    :meth:`Pool.adopt` moves none; whoever adds a copying path adds to this.
    """
