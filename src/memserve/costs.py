"""What a worker's steps cost and where they run, as figures that travel.

The worker measures them, its heartbeats carry them and schedulers read them.
:mod:`memserve.scheduling.cost_model` computes with them.
"""

from __future__ import annotations

import attrs


@attrs.frozen
class StepCosts:
    """A step takes ``dense`` of its tokens, plus ``row_s + read_s * context + pair_s * pairs`` for each row.

    A row of ``n`` new tokens behind ``context`` earlier ones has ``n * (context + n / 2)`` pairs, because
    each new token attends to all tokens before it: this part is quadratic. The dense part is a table and not
    a line: a step of few tokens takes as long as reading the weights once, so a prompt runs along with the
    streams for nothing.
    """

    dense: tuple[tuple[float, float], ...]
    """(tokens, seconds) with growing tokens, interpolated linearly. Fewer tokens than the first entry cost as
    much as it; beyond the last entry the last line is extended."""
    row_s: float = 0.0
    """Seconds for each row, drawing a token included."""
    read_s: float = 0.0
    """Seconds for each earlier token of a row, whose KV is read once."""
    pair_s: float = 0.0
    chunk_tokens: int = 256
    """Prompt tokens that a step takes next to running streams; twice as many without streams."""
    token_bytes: int = 0
    """Bytes of KV for one token, to price what is moved."""
    decode_crowding: float = 1.0
    """Relative slowdown of a step of streams alone on half of the cores: 0: none, 1: twice as long."""
    prefill_crowding: float = 1.0
    """Relative slowdown of a step with prompt tokens on half of the cores. Such steps share cores less well:
    a part of them always runs on one core."""
    rough: bool = False
    """Whether they were measured beside other programs or on fewer cores, and so may be several times too high."""

    def crowded(self, slices: float, prompts: bool) -> float:
        """Factor on a step's seconds when other workers take part of its cores.

        The step then has one of ``slices`` equal slices of the cores that it has alone. ``slices``: see
        :meth:`Site.slices`. ``prompts``: whether prompt tokens are in the step.
        """
        return 1.0 + (self.prefill_crowding if prompts else self.decode_crowding) * (slices - 1.0)

    def scaled(self, times: float) -> StepCosts:
        """The costs of steps that take ``times`` times as long."""
        seconds = {name: times * getattr(self, name) for name in ("row_s", "read_s", "pair_s")}
        return attrs.evolve(self, dense=tuple((tokens, times * one) for tokens, one in self.dense), **seconds)


GIVE_AFTER_S = 0.5
"""Seconds that a worker waits for a core before a native step under way gives it one, at the end of its
current layer: the longest that another worker's prompt stops a stream. Giving a core at once would cost more:
of eight prompts that arrive together, the streams of the first four would take half of the cores from the
other four and decode in smaller batches (docs/measurements/2026-11-27-serving.md)."""


@attrs.frozen
class Site:
    """The cores, or the GPU, that a worker's steps run on.

    Workers with the same key share a site, and so slow each other down.
    """

    key: str
    """Identifies the site: workers that share it have equal keys. It does not say where the site is."""
    cores: float = 1.0
    """Cores of the site in all. A GPU counts as one."""
    threads: float = 1.0
    """The most cores that one step of this worker takes."""

    def slices(self, others: float) -> float:
        """How many times fewer cores a step has than alone, while ``others`` more workers have work."""
        return max(1.0, self.threads * (1.0 + others) / self.cores)
