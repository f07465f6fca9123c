"""Paged attention on CPU with torch alone: the reference for every other backend.

Decode rows of similar length run together: their pages are gathered into one dense block, (2, rows, kv_heads,
slots, head_dim). The unused tail of each row's last page is zeroed and masked, because it may hold anything,
NaN included. Prefill chunks run one by one, in blocks of queries, each without the keys behind its last
position.

Query heads that share a kv head become additional queries: q is viewed as (rows, kv_heads, group * queries,
head_dim). ``enable_gqa`` would do the same, six times slower in bfloat16 with one query a row (torch 2.13).
"""

from __future__ import annotations

import attrs
import torch
from torch.nn.functional import scaled_dot_product_attention

from memserve.engine.plans import BatchPlan, Row
from memserve.tokens import count, pages_for

QUERY_BLOCK = 128
"""Queries of a chunk that run at once.

Smaller blocks skip more of the masked triangle, larger ones need fewer calls.
"""


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
    """(rows, 1, 1, slots), 0 or -inf. None if all rows are equally long."""


@attrs.frozen
class _Chunk:
    """The plan of one row's prefill chunk."""

    first: int
    """Index in the batch of the chunk's first token."""
    blocks: torch.Tensor
    """(2 * kv_heads * pages,) int64: blocks of layer 0 to gather."""
    parts: tuple[tuple[int, int, int, torch.Tensor], ...]
    """Query blocks: first and last (exclusive) query, number of keys seen, mask (group * queries, keys)."""


@attrs.frozen
class CpuPlan:
    """The plan that ``CpuAttention`` makes of one batch."""

    append: torch.Tensor
    """(tokens * kv_heads,) int64: the vectors of layer 0's K to which the heads of each token are written."""
    decodes: tuple[_Decode, ...]
    chunks: tuple[_Chunk, ...]


class CpuAttention:
    """The reference backend, over one arena. See :class:`~memserve.kernels.AttentionBackend`."""

    def __init__(self, arena: torch.Tensor, heads: int) -> None:
        self._pages, self._layers, _, self._kv_heads, self._page_tokens, self._head_dim = arena.shape
        self._group = heads // self._kv_heads
        self._dtype = arena.dtype
        # Two flat views of the same memory: a *block* is the K (or V) of one page, layer and kv head; a
        # *vector* is one token's part of it. Indices into both grow by a constant from layer to layer.
        self._blocks = arena.view(-1, self._page_tokens * self._head_dim)
        self._vectors = arena.view(-1, self._head_dim)

    # ---- once a batch ---------------------------------------------------------------------------------------

    def plan(self, batch: BatchPlan) -> CpuPlan:
        """Indices and masks for the rows of ``batch``."""
        appends: list[torch.Tensor] = []
        decodes: list[tuple[int, Row]] = []
        chunks: list[_Chunk] = []
        first = 0
        for row in batch.rows:
            tokens = count(row.tokens)
            appends.append(self._append(row, tokens))
            if tokens == 1:
                decodes.append((first, row))
            else:
                chunks.append(self._chunk(first, row, tokens))
            first += tokens
        buckets = tuple(self._decode(bucket) for bucket in self._buckets(decodes))
        return CpuPlan(torch.cat(appends), buckets, tuple(chunks))

    def _append(self, row: Row, tokens: int) -> torch.Tensor:
        positions = torch.arange(row.start, row.start + tokens)
        pages = torch.tensor(row.pages)[positions // self._page_tokens]  # (tokens,)
        heads = torch.arange(self._kv_heads)
        blocks = (pages * (self._layers * 2 * self._kv_heads))[:, None] + heads  # (tokens, kv_heads)
        return (blocks * self._page_tokens + (positions % self._page_tokens)[:, None]).flatten()

    def _buckets(self, rows: list[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
        """Group rows by similar length, so that padding stays below half of what is read."""
        buckets: list[list[tuple[int, Row]]] = []
        for first, row in sorted(rows, key=lambda item: item[1].start):
            if not buckets or row.end > 1.5 * buckets[-1][0][1].end + 2 * self._page_tokens:
                buckets.append([])
            buckets[-1].append((first, row))
        return buckets

    def _block_indices(self, pages: torch.Tensor) -> torch.Tensor:
        """Blocks of layer 0 that hold ``pages`` (rows, n), in the order (2, rows, kv_heads, n), flattened."""
        halves = torch.arange(2)[:, None, None, None] * self._kv_heads
        heads = torch.arange(self._kv_heads)[:, None]
        return (pages[:, None, :] * (self._layers * 2 * self._kv_heads) + heads + halves).flatten()

    def _decode(self, bucket: list[tuple[int, Row]]) -> _Decode:
        ends = [row.end for _, row in bucket]
        longest = max(ends)
        used = [row.pages[: pages_for(row.end, self._page_tokens)] for _, row in bucket]
        width = pages_for(longest, self._page_tokens)
        table = torch.tensor([pages + pages[:1] * (width - len(pages)) for pages in used])  # (rows, width)
        tail = mask = None
        if min(ends) != longest:
            tail = self._tail(ends, width)
            hidden = torch.arange(longest) >= torch.tensor(ends)[:, None]  # (rows, slots)
            mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
            mask = mask[:, None, None, :]
        tokens = torch.tensor([first for first, _ in bucket])
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

    def _chunk(self, first: int, row: Row, tokens: int) -> _Chunk:
        pages = torch.tensor([row.pages[: pages_for(row.end, self._page_tokens)]])
        parts = []
        for begin in range(0, tokens, QUERY_BLOCK):
            end = min(begin + QUERY_BLOCK, tokens)
            keys = row.start + end
            positions = torch.arange(row.start + begin, keys)
            hidden = torch.arange(keys) > positions[:, None]  # (queries, keys)
            mask = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, float("-inf"))
            parts.append((begin, end, keys, mask.repeat(self._group, 1)))
        return _Chunk(first, self._block_indices(pages), tuple(parts))

    # ---- once a layer ---------------------------------------------------------------------------------------

    def run(
        self, plan: CpuPlan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Append, then attend; see :class:`~memserve.kernels.AttentionBackend`."""
        step = self._kv_heads * self._page_tokens
        keys = plan.append + layer * 2 * step
        self._vectors.index_copy_(0, keys, k.reshape(-1, self._head_dim))
        self._vectors.index_copy_(0, keys + step, v.reshape(-1, self._head_dim))
        for decode in plan.decodes:
            self._run_decode(decode, layer, q, out)
        for chunk in plan.chunks:
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
        for begin, end, keys, mask in chunk.parts:
            span = slice(chunk.first + begin, chunk.first + end)
            k, v = kv[:, :, :, :keys]  # (1, kv_heads, keys, head_dim) each
            queries = q[span].view(end - begin, self._kv_heads, self._group, self._head_dim)
            folded = queries.permute(1, 2, 0, 3).reshape(1, self._kv_heads, -1, self._head_dim)
            found = scaled_dot_product_attention(folded, k, v, attn_mask=mask)
            found = found.view(self._kv_heads, self._group, end - begin, self._head_dim).permute(2, 0, 1, 3)
            out[span].view(end - begin, self._kv_heads, self._group, self._head_dim).copy_(found)
