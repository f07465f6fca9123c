"""What a worker's steps cost, as figures that travel: fitted by the worker, carried by its heartbeats, read by schedulers.

What is computed from them is in :mod:`memserve.scheduling.cost_model`.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class StepCosts:
    """A step takes ``dense`` of its tokens, and for each row ``row_s + read_s * context + pair_s * pairs``.

    A row of ``n`` new tokens behind ``context`` earlier ones has ``n * (context + n / 2)`` pairs: each new token attends to
    all before it, a quadratic part. The dense part is a table and not a line: where few tokens run, a step takes as long
    as reading the weights once, and a prompt rides along with the streams for nothing.
    """

    dense: tuple[tuple[float, float], ...]
    """(tokens, seconds), tokens growing; straight lines between. Below the first as the first, beyond the last as the
    last line goes on."""
    row_s: float = 0.0
    """Each row, drawing a token included."""
    read_s: float = 0.0
    """Each earlier token of a row, whose KV is read once."""
    pair_s: float = 0.0
    chunk_tokens: int = 256
    """Prompt tokens a step beside running streams; twice as many without."""
    token_bytes: int = 0
    """KV of one token, for what is moved."""
