"""Which rows a step runs: continuous batching with chunked prefill under a token budget.

Decode rows go first, so that a long prompt never delays a running stream by more than one chunk. Prompts
share the token budget, first come first served. Rows of both kinds run in one step. While no stream runs,
there is none to delay, and the budget is twice as large: each pass over the weights then serves more tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from memserve.engine.plans import BatchPlan, BatchResult
from memserve.engine.sequence import Sequence
from memserve.tokens import pack

ALONE = 2
"""Prefill chunks that a step may run while no stream runs."""
RETIRE = {"off": "none", "1": "prompt", "2": "all", "3": "all"}
"""Which pages each caching mode gives to the index.

On a shared shard modes 2 and 3 do the same and move no byte. Across shards, mode 3 also returns an answer's
pages to the prefill worker's shard.
"""


@attrs.frozen
class BatchLimits:
    """Size limits of a step."""

    chunk_tokens: int
    """Prefill tokens per step while streams run."""
    rows: int
    """Sequences per step."""


@attrs.frozen
class WorkerSettings:
    """A worker's settings, fixed at its start."""

    limits: BatchLimits
    page_tokens: int
    max_context: int
    retire: str
    """Which pages go into the index: ``none``, ``prompt`` or ``all``."""
    fetch_s: float = 5.0
    """How long to wait for pages of another shard before computing them instead, in seconds."""
    returns: bool = False
    """Whether a request handed over from another shard has its answer's pages copied back there (mode 3)."""
    ahead: bool = False
    """Whether a prompt's full pages go to a decode worker on another shard while the rest is computed."""
    page_bytes: int = 0
    """Size of one page's KV in bytes, for the counters."""
    draft: int = 0
    """Draft tokens per stream and step, at most; see :mod:`memserve.engine.drafting`."""
    overlaps: bool = False
    """Whether the engine takes the next step while one is running; see :mod:`memserve.engine.steps`."""
    requests_max: int = 1024
    """Sequences held at once. With that many, a first attempt is answered with Failed (overloaded)."""


@attrs.frozen
class Batch:
    """A plan and the sequences behind its rows, in order."""

    plan: BatchPlan
    sequences: tuple[Sequence, ...]
    ends: tuple[int, ...]
    """Computed tokens of each sequence after the step, not counting draft tokens."""

    def drawn(self, row: int, result: BatchResult) -> bytes:
        """Tokens that a row drew, packed: none, one, or more where draft tokens were accepted."""
        token = result.tokens[row]
        return b"" if token is None else pack([token]) + result.more.get(row, b"")


def form_batch(ready: Iterable[Sequence], limits: BatchLimits, page_tokens: int) -> Batch | None:
    """The next step, or None when nothing in ``ready`` can run.

    Decode rows come first, in the order of ``ready`` (longest-waiting first), then prompts in arrival order.
    """
    runnable = [one for one in ready if one.room(page_tokens) > 0 and one.to_run > 0]
    chosen: list[tuple[Sequence, int]] = [(one, 1) for one in runnable if one.decodes_next][: limits.rows]
    budget = limits.chunk_tokens if chosen else ALONE * limits.chunk_tokens
    for one in sorted((one for one in runnable if not one.decodes_next), key=lambda one: one.order):
        if not budget or len(chosen) == limits.rows:
            break
        chunk = min(budget, one.to_run, one.room(page_tokens))
        chosen.append((one, chunk))
        budget -= chunk
    if not chosen:
        return None
    rows = tuple(one.row(limit) for one, limit in chosen)
    return Batch(BatchPlan(rows), tuple(one for one, _ in chosen), tuple(row.end for row in rows))
