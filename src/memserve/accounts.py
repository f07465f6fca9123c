"""What a request's log line says about it: where its time went, and where the KV of its prompt came from."""

from __future__ import annotations

import attrs


@attrs.frozen
class Timings:
    """Where a request's time went; each worker that serves it fills in its part."""

    queue_ms: float = 0.0
    """From arrival at the prefill worker to the first batch."""
    prefill_ms: float = 0.0
    """From the first batch to the first token."""
    handoff_ms: float = 0.0
    """From the first token until the decode worker owns the lease."""
    decode_ms: float = 0.0
    """From the handoff, or the first token if nothing is handed over, to the last token."""


@attrs.frozen
class Origins:
    """Where the KV of a request's prompt came from, and what was moved for it.

    Each worker that serves the request fills in its part. The figures are those of the last attempt; all of
    them are in the request's log line.
    """

    matched_device_tokens: int = 0
    """Prompt tokens found in the arena of the prefill worker's shard."""
    matched_host_tokens: int = 0
    matched_disk_tokens: int = 0
    fetched_tokens: int = 0
    """Prompt tokens brought to the prefill worker's shard from another shard before the prompt ran."""
    matched_decode_tokens: int = 0
    """Prompt tokens found at the decode worker's shard, when handed over from another shard."""
    bytes_fetched: int = 0
    """Bytes moved for ``fetched_tokens``."""
    bytes_to_decode: int = 0
    """Bytes moved by the handoff."""
    bytes_to_prefill: int = 0
    """Bytes of the answer's pages, returned after the request's end (mode 3) unless that fails."""
    bytes_saved: int = 0
    """Bytes of the pages that were handed over without being moved."""
