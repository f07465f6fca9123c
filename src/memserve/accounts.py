"""What a request's line in the log says of it: where its time went, and where the KV of its prompt came from."""

from __future__ import annotations

import attrs


@attrs.frozen
class Timings:
    """Where a request's time went, filled in by each worker on its way."""

    queue_ms: float = 0.0
    """From arrival at the prefill worker to its first batch."""
    prefill_ms: float = 0.0
    """From the first batch to the first token."""
    handoff_ms: float = 0.0
    """From the first token to the decode worker owning the lease."""
    decode_ms: float = 0.0
    """From there to the last token."""


@attrs.frozen
class Origins:
    """Where the KV of a request's prompt came from, and what was moved for it; filled in by each worker on its way.

    Of the last attempt; all of it is in the request's line in the log.
    """

    matched_device_tokens: int = 0
    """Found at the prefill worker's shard, in the arena."""
    matched_host_tokens: int = 0
    matched_disk_tokens: int = 0
    fetched_tokens: int = 0
    """Brought to that shard from another before the prompt ran."""
    matched_decode_tokens: int = 0
    """Found at the decode worker's shard when the request was handed over from another."""
    bytes_fetched: int = 0
    """Moved for ``fetched_tokens``."""
    bytes_to_decode: int = 0
    """Moved by the hand-over."""
    bytes_to_prefill: int = 0
    """The answer's pages that are returned behind the request's end (mode 3), unless that fails."""
    bytes_saved: int = 0
    """Of the pages that were handed over without being moved."""
