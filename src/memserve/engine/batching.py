"""Which rows a step runs: continuous batching with chunked prefill under a token budget.

Decode rows go first, so that a long prompt never holds up a running stream by more than one chunk; the rest of
the budget goes to prompts, first come first served. Rows of both kinds share one step. While no stream runs there
is nobody to hold up, and the budget is twice as large: a step's pass over the weights then serves more tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from memserve.engine.plans import BatchPlan, BatchResult
from memserve.engine.sequence import Sequence
from memserve.tokens import pack

ALONE = 2
"""Chunks that a step takes while no stream runs."""


@attrs.frozen
class BatchLimits:
    """How large a step may be."""

    chunk_tokens: int
    """Prefill tokens a step beside running streams."""
    rows: int
    """Sequences a step."""


@attrs.frozen
class WorkerSettings:
    """What a worker is told at start."""

    limits: BatchLimits
    page_tokens: int
    max_context: int
    retire: str
    """Which pages go into the index: ``none``, ``prompt`` or ``all``."""
    fetch_s: float = 5.0
    """How long pages of another shard are waited for, before they are computed instead."""
    returns: bool = False
    """Whether a request that was handed over from another shard leaves its answer's pages there too (mode 3)."""
    ahead: bool = False
    """Whether a prompt's full pages go to a decode worker on another shard while the rest is computed."""
    page_bytes: int = 0
    """Of one page's KV, for the counters."""
    draft: int = 0
    """Tokens that a stream may guess in a step; see :mod:`memserve.engine.drafting`."""
    requests_max: int = 1024
    """Sequences held at once; beyond it a first attempt is answered with Failed (overloaded)."""


@attrs.frozen
class Batch:
    """A plan and the sequences behind its rows, in order."""

    plan: BatchPlan
    sequences: tuple[Sequence, ...]
    ends: tuple[int, ...]
    """Tokens computed of each once the step is done, those of drafts not counted."""

    def drawn(self, row: int, result: BatchResult) -> bytes:
        """What a row drew, packed: nothing, a token, or more where its draft was right."""
        token = result.tokens[row]
        return b"" if token is None else pack([token]) + result.more.get(row, b"")


def form_batch(ready: Iterable[Sequence], limits: BatchLimits, page_tokens: int) -> Batch | None:
    """The next step over ``ready`` (longest-waiting decode rows first, prompts in arrival order), or None."""
    runnable = [one for one in ready if one.room(page_tokens) > 0 and one.computed < one.length]
    chosen: list[tuple[Sequence, int]] = [(one, 1) for one in runnable if one.decoding][: limits.rows]
    budget = limits.chunk_tokens if chosen else ALONE * limits.chunk_tokens
    for one in sorted((one for one in runnable if not one.decoding), key=lambda one: one.order):
        if not budget or len(chosen) == limits.rows:
            break
        chunk = min(budget, one.length - one.computed, one.room(page_tokens))
        chosen.append((one, chunk))
        budget -= chunk
    if not chosen:
        return None
    rows = tuple(one.row(limit) for one, limit in chosen)
    return Batch(BatchPlan(rows), tuple(one for one, _ in chosen), tuple(row.end for row in rows))
