"""What steps, prefills, transfers and swap-ins cost on one instance, in seconds.

This is only arithmetic on fitted figures. ``prefill_s`` is the paper's ``exec(x, y)`` (MemServe, 5.3), for an
engine that runs prompts in chunks next to its streams. Where the paper sums operators over a prompt, this
sums steps. Each step reads the weights once, so a prompt costs a fixed part for every step, a part linear in
its tokens and a quadratic part for attention.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import chain, pairwise
from typing import Any

import attrs

from memserve.costs import StepCosts
from memserve.engine.batching import ALONE


@attrs.frozen
class LinkModel:
    """The cost of one path for bytes: a fixed time for each use, plus a time for each byte."""

    fixed_s: float = 0.0
    byte_s: float = 0.0

    def seconds(self, size: float) -> float:
        """Seconds until ``size`` bytes have arrived, if none are before them on the same path."""
        return self.fixed_s + self.byte_s * size


LINKS: Mapping[str, LinkModel] = {
    "shared": LinkModel(0.001),
    "mapped": LinkModel(0.002, 1 / 4e9),
    "cuda": LinkModel(0.001, 1 / 20e9),
    "tcp": LinkModel(0.004, 1 / 1e9),
    "nixl": LinkModel(0.001, 1 / 20e9),
}
"""Assumed costs between shards by path (docs/transfers.md), used unless configured otherwise. ``shared`` is
between workers of one shard, where no byte moves."""
SWAP = LinkModel(0.001, 1 / 2e9)
"""Assumed cost of bringing bytes from the host tier into the arena."""


@attrs.define
class CostModel:
    """The costs of one instance."""

    steps: StepCosts
    scale: float = 1.0
    """How much longer steps take at present than ``steps`` says."""
    prompt_scale: float | None = None
    """The same for steps with prompt tokens; None: as for all others."""
    links: Mapping[str, LinkModel] = attrs.field(factory=lambda: LINKS)
    swap: LinkModel = SWAP
    _tokens: tuple[float, ...] = attrs.field(init=False, repr=False)
    _lines: tuple[tuple[float, float, float], ...] = attrs.field(init=False, repr=False)
    """The line to the right of each entry of the dense table: (tokens, seconds, seconds a token)."""

    def __attrs_post_init__(self) -> None:
        table = self.steps.dense
        if not table or any(before[0] >= after[0] for before, after in pairwise(table)):
            raise ValueError(f"dense needs (tokens, seconds) with growing tokens, got {table}")
        slopes = [(high[1] - low[1]) / (high[0] - low[0]) for low, high in pairwise(table)] or [0.0]
        self._tokens = tuple(tokens for tokens, _ in table)
        self._lines = tuple((*one, slope) for one, slope in zip(table, [*slopes, slopes[-1]], strict=False))

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> CostModel:
        """The model from a TOML table.

        The table has StepCosts' fields, and ``links`` and ``swap`` as tables of LinkModel's fields. Raises
        TypeError for an unknown key, ValueError for a wrong table.
        """
        values = dict(table)
        links = {path: LinkModel(**one) for path, one in dict(values.pop("links", {})).items()}
        swap = LinkModel(**values.pop("swap")) if "swap" in values else SWAP
        values["dense"] = tuple((float(tokens), float(seconds)) for tokens, seconds in values["dense"])
        steps = StepCosts(**values)
        figures = [
            *chain(*steps.dense),
            *attrs.astuple(steps, recurse=False)[1:],
            *chain(*map(attrs.astuple, (swap, *links.values()))),
        ]
        if not all(0 <= one < math.inf for one in figures) or steps.chunk_tokens < 1:
            raise ValueError("every figure must be a number, not below 0, and chunk_tokens not below 1")
        return cls(steps, links={**LINKS, **links}, swap=swap)

    @property
    def _prompts(self) -> float:
        return self.scale if self.prompt_scale is None else self.prompt_scale

    @property
    def token_s(self) -> float:
        """Seconds for one more prompt token in a large step."""
        return self._prompts * self._lines[-1][2]

    # ---- steps ----------------------------------------------------------------------------------------------

    def step_s(self, rows: Iterable[tuple[int, int]], drafts: Iterable[tuple[int, int]] = ()) -> float:
        """Seconds of one step of any mix of rows, each (new tokens, context tokens before them), by ``scale``.

        ``drafts``: rows' draft tokens, likewise. Each has a draw, as a row has, but its row's context is read once.
        """
        tokens = number = context = 0
        pairs = 0.0
        for new, before in rows:
            tokens += new
            number += 1
            context += before
            pairs += new * (before + new / 2)
        for new, before in drafts:
            tokens += new
            number += new
            pairs += new * (before + new / 2)
        return self.batch_s(tokens, number, context, pairs)

    def batch_s(self, tokens: float, rows: float, context: float, pairs: float) -> float:
        """Seconds of one step by its totals: new tokens, rows, context tokens, pairs (see StepCosts)."""
        known = self.steps
        attention = known.read_s * context + known.pair_s * pairs
        return self.scale * (self._dense(tokens) + known.row_s * rows + attention)

    def decode_s(self, rows: float, context: float) -> float:
        """Seconds of a step of ``rows`` streams with ``context`` tokens in all; 0 without rows."""
        return self.batch_s(rows, rows, context, context + rows / 2) if rows else 0.0

    def prefill_s(self, tokens: int, cached: int, rows: float = 0, context: float = 0) -> float:
        """Seconds to run a prompt of which ``cached`` tokens are cached, next to ``rows`` streams.

        ``context``: tokens of the streams in all. The last prompt token always runs, because its logits are
        needed. The result includes the streams' own steps in that time.
        """
        cached = max(0, min(cached, tokens - 1))
        left = tokens - cached
        chunk = self.steps.chunk_tokens * (1 if rows else ALONE)
        full, rest = divmod(left, chunk)
        known = self.steps
        steps = full + (rest > 0)
        dense = full * self._dense(chunk + rows) + (self._dense(rest + rows) if rest else 0.0)
        # Contexts before the chunks are cached, cached + chunk, and so on; read is their sum.
        read = steps * cached + chunk * steps * (steps - 1) / 2
        own = known.row_s * steps + known.read_s * read + known.pair_s * left * (cached + left / 2)
        others = steps * (known.row_s * rows + known.read_s * context + known.pair_s * (context + rows / 2))
        return self._prompts * (dense + own + others)

    def shared_s(self, queued: float, left_s: float, tokens: float, rows: float = 0) -> float:
        """Seconds saved by running ``tokens`` in the last step of a queue, not in a step of their own.

        ``queued``: tokens in the queue. ``left_s``: seconds until the queue has run. The result is 0 when its
        last step has begun or has no room for them.
        """
        chunk = self.steps.chunk_tokens * (1 if rows else ALONE)
        rest = queued % chunk
        if left_s <= 0 or not rest or rest + tokens > chunk:
            return 0.0
        last = self._dense(rest + rows)
        if left_s <= self._prompts * last:
            return 0.0
        return self._prompts * max(0.0, last + self._dense(tokens + rows) - self._dense(rest + tokens + rows))

    def queue_s(self, tokens: float, pairs: float, rows: float = 0, context: float = 0) -> float:
        """Seconds to run ``tokens`` of several prompts, with ``pairs`` in all, next to ``rows`` streams."""
        if tokens <= 0:
            return 0.0
        chunk = self.steps.chunk_tokens * (1 if rows else ALONE)
        full, rest = divmod(tokens, chunk)
        dense = full * self._dense(chunk + rows) + (self._dense(rest + rows) if rest else 0.0)
        known, steps = self.steps, full + (rest > 0)
        others = known.row_s * (1 + rows) + known.read_s * context + known.pair_s * (context + rows / 2)
        return self._prompts * (dense + known.pair_s * pairs + steps * others)

    def _dense(self, tokens: float) -> float:
        after = bisect_right(self._tokens, tokens)
        if not after:
            return self._lines[0][1]
        start, seconds, slope = self._lines[after - 1]
        return seconds + slope * (tokens - start)

    # ---- bytes ----------------------------------------------------------------------------------------------

    @property
    def handoff_s(self) -> float:
        """Seconds from the first token until the decode worker owns the request, if no page moves."""
        return self.links["shared"].fixed_s

    def swap_in_s(self, size: float) -> float:
        """Seconds to bring ``size`` bytes from a slower tier into the arena."""
        return self.swap.seconds(size) if size else 0.0

    def swap_break_even(self) -> float:
        """Tokens from which a swap-in is faster than computing them; infinity if it never is.

        A token's cost is its share of a full step: the difference of two measured steps may be noise.
        """
        whole = ALONE * self.steps.chunk_tokens
        saved_s = self.prefill_s(whole, 0) / whole - self.swap.byte_s * self.steps.token_bytes
        return self.swap.fixed_s / saved_s if saved_s > 0 else math.inf
