"""Paged attention on CPU with torch alone: the reference for every other backend.

Decode rows of similar length run together: their pages are gathered into one dense block, (2, rows, kv_heads,
slots, head_dim). The unused tail of each row's last page is zeroed and masked, because it may hold anything,
NaN included. Prefill chunks run one by one, in blocks of queries, each without the keys behind its last
position.

Local layers have a plan of their own if a row reaches beyond the window. Its rows begin with the page in which the
window of their first token begins; positions before a token's window are masked.

Query heads that share a kv head become additional queries: q is viewed as (rows, kv_heads, group * queries,
head_dim). ``enable_gqa`` would do the same, six times slower in bfloat16 with one query a row (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch.nn.functional import scaled_dot_product_attention

from memserve.engine.plans import BatchPlan, Row
from memserve.engine.spec import ModelSpec
from memserve.tokens import count, pages_for

QUERY_BLOCK = 128
"""Queries of a chunk that run at once.

Smaller blocks skip more of the masked triangle, larger ones need fewer calls.
"""


@attrs.frozen
class _Seen:
    """What a row's tokens attend to: positions counted from the begin of the first page among ``pages``."""

    first: int
    """Index in the batch of the row's first token."""
    pages: tuple[int, ...]
    start: int
    """Position of the row's first token."""
    end: int
    """The position after its last token."""
    begin: int
    """The first position that its first token attends to."""


@attrs.frozen
class _Decode:
    """The plan of decode rows of similar length, which run together."""

    tokens: torch.Tensor
    """(rows,) int64: index in the batch of each row's one token."""
    blocks: torch.Tensor
    """(2 * rows * kv_heads * pages,) int64: blocks of layer 0 to gather.

    A short row repeats its first page.
    """
    slots: int
    """Gathered positions per row that the longest row attends to."""
    tail: torch.Tensor | None
    """int64: gathered vectors to zero, behind the end of their row. None if all rows are equally long."""
    mask: torch.Tensor | None
    """(rows, 1, 1, slots), 0 or -inf. None if all rows attend to all slots."""


@attrs.frozen
class _Chunk:
    """The plan of one row's prefill chunk."""

    first: int
    """Index in the batch of the chunk's first token."""
    blocks: torch.Tensor
    """(2 * kv_heads * pages,) int64: blocks of layer 0 to gather."""
    parts: tuple[tuple[slice, slice, torch.Tensor], ...]
    """Query blocks: the queries, the keys that any of them sees, and the mask (group * queries, keys)."""


@attrs.frozen
class _Rows:
    """How the rows of a batch attend in some of the layers."""

    decodes: tuple[_Decode, ...]
    chunks: tuple[_Chunk, ...]


@attrs.frozen
class CpuPlan:
    """The plan that ``CpuAttention`` makes of one batch."""

    append: torch.Tensor
    """(tokens * kv_heads,) int64: the vectors of layer 0's K to which the heads of each token are written."""
    everywhere: _Rows
    """For layers whose tokens attend to all earlier positions."""
    local: _Rows
    """For local layers."""


class CpuAttention:
    """The reference backend, over one arena. See :class:`~memserve.kernels.AttentionBackend`."""

    def __init__(
        self, arena: torch.Tensor, heads: int, window: int | None = None, local_layers: Sequence[int] = ()
    ) -> None:
        """``window``, ``local_layers``: see :class:`~memserve.engine.spec.ModelSpec`."""
        self._pages, self._layers, _, self._kv_heads, self._page_tokens, self._head_dim = arena.shape
        self._group = heads // self._kv_heads
        self._dtype = arena.dtype
        self._window, self._local = window, frozenset(local_layers)
        # Two flat views of the same memory: a *block* is the K (or V) of one page, layer and kv head; a
        # *vector* is one token's part of it. Indices into both grow by a constant from layer to layer.
        self._blocks = arena.view(-1, self._page_tokens * self._head_dim)
        self._vectors = arena.view(-1, self._head_dim)

    # ---- once a batch ---------------------------------------------------------------------------------------

    def plan(self, batch: BatchPlan) -> CpuPlan:
        """Indices and masks for the rows of ``batch``."""
        append = torch.cat([self._append(row, count(row.tokens)) for row in batch.rows])
        rows = local = self._rows(batch.rows, None)
        if self._local and self._window is not None and any(row.end > self._window for row in batch.rows):
            local = self._rows(batch.rows, self._window)
        return CpuPlan(append, rows, local)

    def _rows(self, rows: Sequence[Row], window: int | None) -> _Rows:
        seen, first = [], 0
        for row in rows:
            seen.append(self._seen(first, row, window))
            first += count(row.tokens)
        decodes = [one for one in seen if one.end - one.start == 1]
        chunks = [one for one in seen if one.end - one.start > 1]
        return _Rows(
            tuple(self._decode(bucket, window) for bucket in self._buckets(decodes)),
            tuple(self._chunk(one, window) for one in chunks),
        )

    def _seen(self, first: int, row: Row, window: int | None) -> _Seen:
        begin = 0 if window is None else max(0, row.start + 1 - window)
        skipped = begin // self._page_tokens
        pages = row.pages[skipped : pages_for(row.end, self._page_tokens)]
        before = skipped * self._page_tokens
        return _Seen(first, pages, row.start - before, row.end - before, begin - before)

    def _append(self, row: Row, tokens: int) -> torch.Tensor:
        positions = torch.arange(row.start, row.start + tokens)
        pages = torch.tensor(row.pages)[positions // self._page_tokens]  # (tokens,)
        heads = torch.arange(self._kv_heads)
        blocks = (pages * (self._layers * 2 * self._kv_heads))[:, None] + heads  # (tokens, kv_heads)
        return (blocks * self._page_tokens + (positions % self._page_tokens)[:, None]).flatten()

    def _buckets(self, rows: list[_Seen]) -> list[list[_Seen]]:
        """Group rows by similar length, so that padding stays below half of what is read."""
        buckets: list[list[_Seen]] = []
        for row in sorted(rows, key=lambda one: one.start):
            if not buckets or row.end > 1.5 * buckets[-1][0].end + 2 * self._page_tokens:
                buckets.append([])
            buckets[-1].append(row)
        return buckets

    def _block_indices(self, pages: torch.Tensor) -> torch.Tensor:
        """Blocks of layer 0 that hold ``pages`` (rows, n), in the order (2, rows, kv_heads, n), flattened."""
        halves = torch.arange(2)[:, None, None, None] * self._kv_heads
        heads = torch.arange(self._kv_heads)[:, None]
        return (pages[:, None, :] * (self._layers * 2 * self._kv_heads) + heads + halves).flatten()

    def _decode(self, bucket: list[_Seen], window: int | None) -> _Decode:
        ends = [row.end for row in bucket]
        longest = max(ends)
        width = pages_for(longest, self._page_tokens)
        table = torch.tensor([row.pages + row.pages[:1] * (width - len(row.pages)) for row in bucket])
        tail = self._tail(ends, width) if min(ends) != longest else None
        mask = None
        if tail is not None or any(row.begin for row in bucket):
            mask = self._mask(torch.tensor(ends) - 1, 0, longest, window)[:, None, None, :]
        tokens = torch.tensor([row.first for row in bucket])
        return _Decode(tokens, self._block_indices(table), longest, tail, mask)

    def _tail(self, ends: list[int], width: int) -> torch.Tensor:
        """Gathered vectors, of (2, rows, kv_heads, width * page_tokens), that no token was written to.

        In a row of several pages they end with its last page: the first page, repeated after it, is full. A
        row of one page repeats that page, so its tail extends to the end.
        """
        slots = width * self._page_tokens
        spare = [
            row * self._kv_heads * slots + slot
            for row, end in enumerate(ends)
            for slot in range(
                end,
                pages_for(end, self._page_tokens) * self._page_tokens if end > self._page_tokens else slots,
            )
        ]
        heads = torch.arange(self._kv_heads)[:, None] * slots
        halves = torch.arange(2)[:, None, None] * (len(ends) * self._kv_heads * slots)
        return (torch.tensor(spare, dtype=torch.int64) + heads + halves).flatten()

    def _chunk(self, row: _Seen, window: int | None) -> _Chunk:
        parts = []
        for first in range(row.start, row.end, QUERY_BLOCK):
            end = min(first + QUERY_BLOCK, row.end)
            begin = 0 if window is None else max(0, first + 1 - window)
            mask = self._mask(torch.arange(first, end), begin, end, window)
            queries = slice(first - row.start, end - row.start)
            parts.append((queries, slice(begin, end), mask.repeat(self._group, 1)))
        return _Chunk(row.first, self._block_indices(torch.tensor([row.pages])), tuple(parts))

    def _mask(self, positions: torch.Tensor, begin: int, end: int, window: int | None) -> torch.Tensor:
        """0 where the tokens at ``positions`` attend to positions [begin, end), else -inf: (tokens, end - begin)."""
        keys = torch.arange(begin, end)
        hidden = keys > positions[:, None]
        if window is not None:
            hidden |= keys <= positions[:, None] - window
        return torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))

    # ---- once a layer ---------------------------------------------------------------------------------------

    def run(
        self, plan: CpuPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Append, then attend; see :class:`~memserve.kernels.AttentionBackend`."""
        step = self._kv_heads * self._page_tokens
        keys = plan.append + layer * 2 * step
        self._vectors.index_copy_(0, keys, k.reshape(-1, self._head_dim))
        self._vectors.index_copy_(0, keys + step, v.reshape(-1, self._head_dim))
        rows = plan.local if layer in self._local else plan.everywhere
        for decode in rows.decodes:
            self._run_decode(decode, layer, q, out)
        for chunk in rows.chunks:
            self._run_chunk(chunk, layer, q, out)

    def _gather(self, blocks: torch.Tensor, layer: int, rows: int) -> torch.Tensor:
        """Gathered K and V: (2, rows, kv_heads, slots, head_dim)."""
        found = self._blocks.index_select(0, blocks + layer * 2 * self._kv_heads)
        return found.view(2, rows, self._kv_heads, -1, self._head_dim)

    def _run_decode(self, decode: _Decode, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        rows = len(decode.tokens)
        kv = self._gather(decode.blocks, layer, rows)
        if decode.tail is not None:
            kv.view(-1, self._head_dim).index_fill_(0, decode.tail, 0)
        k, v = kv[:, :, :, : decode.slots]  # (rows, kv_heads, slots, head_dim) each
        queries = q.index_select(0, decode.tokens).view(rows, self._kv_heads, self._group, self._head_dim)
        found = scaled_dot_product_attention(queries, k, v, attn_mask=decode.mask)
        out.index_copy_(0, decode.tokens, found.reshape(rows, -1, self._head_dim))

    def _run_chunk(self, chunk: _Chunk, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        kv = self._gather(chunk.blocks, layer, 1)
        for within, keys, mask in chunk.parts:
            span = slice(chunk.first + within.start, chunk.first + within.stop)
            k, v = kv[:, :, :, keys]  # (1, kv_heads, keys, head_dim) each
            queries = q[span].view(-1, self._kv_heads, self._group, self._head_dim)
            folded = queries.permute(1, 2, 0, 3).reshape(1, self._kv_heads, -1, self._head_dim)
            found = scaled_dot_product_attention(folded, k, v, attn_mask=mask)
            found = found.view(self._kv_heads, self._group, -1, self._head_dim).permute(2, 0, 1, 3)
            out[span].view(-1, self._kv_heads, self._group, self._head_dim).copy_(found)


def attention_of(spec: ModelSpec, arena: torch.Tensor) -> CpuAttention:
    """The attention of a model on an arena of its pages."""
    return CpuAttention(arena, spec.heads, spec.sliding_window, spec.local_layers)
