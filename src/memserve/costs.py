"""What a worker's steps cost and where they run, as figures that travel: found by the worker, carried by its heartbeats,
read by schedulers.

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
    decode_crowding: float = 1.0
    """By which share a step of streams alone takes longer on half of the cores: 0 is as long, 1 twice as long."""
    prefill_crowding: float = 1.0
    """The same of a step with prompt tokens, which cores share less well: part of it runs on one in any case."""

    def crowded(self, slices: float, prompts: bool) -> float:
        """What a step's seconds are multiplied by on one of so many equal slices of the cores that it has alone.

        ``slices``: see :meth:`Site.slices`. ``prompts``: whether prompt tokens are in the step.
        """
        return 1.0 + (self.prefill_crowding if prompts else self.decode_crowding) * (slices - 1.0)


GIVE_AFTER_S = 0.5
"""How long a worker waits for a core until a native step under way gives it one, after the layer that it is in: the longest stop
of a stream for another worker's prompt. At once would be dearer: of eight prompts that come together, the streams of the first
four would take half of the cores from the other four, and decode in smaller batches (docs/measurements/2026-11-27-serving.md)."""


@attrs.frozen
class Site:
    """The cores, or the GPU, that a worker's steps run on. Workers of one key share them, and so crowd one another."""

    key: str
    """The same for those that share it, different for all others. Says nothing of where that is."""
    cores: float = 1.0
    """In all. A GPU counts as one."""
    threads: float = 1.0
    """Of them, the most that one step of this worker takes."""

    def slices(self, others: float) -> float:
        """How many times fewer cores a step has while ``others`` of the site have work, too, than when it is alone."""
        return max(1.0, self.threads * (1.0 + others) / self.cores)
