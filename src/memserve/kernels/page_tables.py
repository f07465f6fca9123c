"""A batch plan as FlashInfer's index arrays, made on the host with numpy.

Rows with one token come first and are decoded together; rows with more follow as prefill. Within a row, page table
and last page length already include the tokens that the step appends, as FlashInfer's append wants it.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np
from numpy.typing import NDArray

from memserve.engine.plans import BatchPlan, Row
from memserve.tokens import count, pages_for

Ints = NDArray[np.int32]

BUCKETS = (
    1,
    2,
    4,
    8,
    16,
    24,
    32,
    48,
    64,
    80,
    96,
    112,
    128,
    160,
    192,
    224,
    256,
    320,
    384,
    448,
    512,
    640,
    768,
    896,
    1024,
)
"""Batch sizes that a step of decode rows is padded to. Padding costs time in proportion to the rows, capture costs once."""  # fmt: skip


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """The batch sizes to capture for steps of up to ``rows`` decode rows."""
    return (*(size for size in BUCKETS if size < rows), min(size for size in BUCKETS if size >= rows))


def bucket_of(rows: int, buckets: Sequence[int]) -> int | None:
    """The smallest captured batch size that holds ``rows`` rows, or None when there is none."""
    return next((size for size in buckets if size >= rows), None)


@attrs.frozen(eq=False)
class Table:
    """The page tables of some rows, in FlashInfer's form: all int32."""

    indptr: Ints
    """(rows + 1,): where each row's pages begin in ``indices``."""
    indices: Ints
    """Page numbers of all rows, one row after another."""
    last_page_len: Ints
    """(rows,): tokens in each row's last page, 1 to page_tokens."""

    @classmethod
    def of(cls, rows: Sequence[Row], page_tokens: int) -> Table:
        """The tables of ``rows`` after their tokens were appended."""
        ends = np.fromiter((row.end for row in rows), np.int32, len(rows))
        used = -(-ends // page_tokens)
        indptr = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(used, out=indptr[1:])
        indices = np.empty(int(indptr[-1]), np.int32)
        for row, first, last in zip(rows, indptr.tolist(), indptr[1:].tolist(), strict=False):
            indices[first:last] = row.pages[: last - first]
        return cls(indptr, indices, (ends - 1) % page_tokens + 1)

    def padded(self, rows: int, scratch: int) -> Table:
        """The same with rows of one token on page ``scratch`` up to ``rows`` rows."""
        missing = rows - len(self.last_page_len)
        indptr = np.concatenate((self.indptr, self.indptr[-1] + np.arange(1, missing + 1, dtype=np.int32)))
        indices = np.concatenate((self.indices, np.full(missing, scratch, np.int32)))
        last_page_len = np.concatenate((self.last_page_len, np.ones(missing, np.int32)))
        return Table(indptr, indices, last_page_len)

    def joined(self, other: Table) -> Table:
        """Both, this one's rows first."""
        return Table(
            np.concatenate((self.indptr, self.indptr[-1] + other.indptr[1:])),
            np.concatenate((self.indices, other.indices)),
            np.concatenate((self.last_page_len, other.last_page_len)),
        )


@attrs.frozen(eq=False)
class StepTables:
    """Everything of a batch that its attention needs."""

    order: tuple[int, ...]
    """Rows of the plan in the order in which the step has them: one-token rows, then chunks."""
    decodes: int
    """How many of them have one token."""
    decode: Table
    chunks: Table
    qo_indptr: Ints
    """(chunks + 1,): where each chunk's tokens begin, counted from the first chunk's first token."""
    ids: Ints
    """(tokens,): token ids in the step's order."""
    positions: Ints
    """(tokens,): their positions."""
    batch_indices: Ints
    """(tokens,): the row, in the step's order, that each belongs to."""
    wanted: Ints
    """Tokens whose logits are wanted, in the step's order."""

    @classmethod
    def of(cls, plan: BatchPlan, page_tokens: int) -> StepTables:
        """The arrays of a plan."""
        counts = [count(row.tokens) for row in plan.rows]
        order = sorted(range(len(counts)), key=lambda i: counts[i] > 1)  # stable
        rows = [plan.rows[i] for i in order]
        lengths = np.array([counts[i] for i in order], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        decodes = int((lengths == 1).sum())
        qo_indptr = np.concatenate(([0], ends[decodes:] - decodes)).astype(np.int32)
        starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
        batch_indices = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
        positions = np.arange(int(ends[-1]), dtype=np.int32) + np.repeat(starts - (ends - lengths), lengths)
        return cls(
            order=tuple(order),
            decodes=decodes,
            decode=Table.of(rows[:decodes], page_tokens),
            chunks=Table.of(rows[decodes:], page_tokens),
            qo_indptr=qo_indptr,
            ids=np.frombuffer(b"".join(row.tokens for row in rows), np.int32),
            positions=positions.astype(np.int32),
            batch_indices=batch_indices,
            wanted=np.array([end - 1 for end, row in zip(ends.tolist(), rows, strict=True) if row.sample is not None], np.int32),
        )  # fmt: skip

    @property
    def all_rows(self) -> Table:
        """The tables of all rows, in the step's order: what append wants."""
        return self.decode.joined(self.chunks)


def continues(rows: Sequence[Row], before: Sequence[Row], page_tokens: int) -> bool:
    """Whether ``rows`` are the decode step after ``before``: one token further each, on the same pages and perhaps more.

    Then the page tables made ahead for ``before`` hold, whatever the tokens are.
    """
    return len(rows) == len(before) and all(
        count(row.tokens) == 1
        and row.start == old.end
        and len(old.pages) >= pages_for(row.end, page_tokens)
        and row.pages[: pages_for(row.end, page_tokens)] == old.pages[: pages_for(row.end, page_tokens)]
        for row, old in zip(rows, before, strict=True)
    )
