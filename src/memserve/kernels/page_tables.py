"""A batch plan as FlashInfer's index arrays, made on the host with numpy.

Rows with one token come first and are decoded together; rows with more tokens follow as prefill. A row's page
table and last page length already include the tokens that the step appends, as FlashInfer's append requires.
Decode rows that share a prefix in the same pages, a system prompt or a document, may attend to those pages
together: see ``Common``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import attrs
import numpy as np
from numpy.typing import NDArray

from memserve.engine.plans import BatchPlan, Row
from memserve.tokens import TOKEN_BYTES, count

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
"""Batch sizes that a step of decode rows is padded to.

Padding costs time per row; each capture costs time once.
"""

MERGE_BYTES = 1 << 27
"""K and V bytes of a layer that attending together must save in a step launched kernel by kernel.

The two additional launches, for the shared prefix and for the merge, take the host some 40 microseconds a
layer, in which a GPU like Hopper reads 128 MB. Estimated, not measured.
"""
GRAPH_BYTES = 3 << 29
"""K and V bytes of a layer that attending together must save in a step that could be one CUDA graph.

Attending together gives up the graph: launching a layer kernel by kernel takes the host about 0.25 ms. In
this time such a GPU reads 0.8 GB from its memory, and 1.5 GB from its second-level cache, which may hold
pages that all rows read. Estimated, not measured.
"""


@attrs.frozen
class Sharing:
    """Bytes of a layer's K and V that rows must save to attend together to a shared prefix; None: never."""

    captured: int | None = GRAPH_BYTES
    """For a step of decode rows alone, which would otherwise be captured."""
    launched: int | None = MERGE_BYTES
    """For any other step."""


def buckets_up_to(rows: int) -> tuple[int, ...]:
    """The batch sizes to capture for steps of up to ``rows`` decode rows."""
    return (*(size for size in BUCKETS if size < rows), min(size for size in BUCKETS if size >= rows))


def bucket_of(rows: int, buckets: Sequence[int]) -> int | None:
    """The smallest captured batch size that holds ``rows`` rows, or None."""
    return next((size for size in buckets if size >= rows), None)


@attrs.frozen(eq=False)
class Table:
    """The page tables of some rows, in FlashInfer's form: all int32."""

    indptr: Ints
    """(rows + 1,): start of each row's pages in ``indices``."""
    indices: Ints
    """Page numbers of all rows, concatenated."""
    last_page_len: Ints
    """(rows,): tokens in each row's last page, 1 to page_tokens."""

    @classmethod
    def of(cls, rows: Sequence[Row], page_tokens: int) -> Table:
        """The tables of ``rows`` as they are once their tokens are appended."""
        ends = np.fromiter((row.end for row in rows), np.int32, len(rows))
        used = -(-ends // page_tokens)
        indptr = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(used, out=indptr[1:])
        indices = np.empty(int(indptr[-1]), np.int32)
        for row, first, last in zip(rows, indptr.tolist(), indptr[1:].tolist(), strict=False):
            indices[first:last] = row.pages[: last - first]
        return cls(indptr, indices, (ends - 1) % page_tokens + 1)

    def padded(self, rows: int, scratch: int) -> Table:
        """This table padded to ``rows`` rows, with rows of one token on page ``scratch``."""
        missing = rows - len(self.last_page_len)
        indptr = np.concatenate((self.indptr, self.indptr[-1] + np.arange(1, missing + 1, dtype=np.int32)))
        indices = np.concatenate((self.indices, np.full(missing, scratch, np.int32)))
        last_page_len = np.concatenate((self.last_page_len, np.ones(missing, np.int32)))
        return Table(indptr, indices, last_page_len)

    def cut(self, begins: Ints, ends: Ints, last_page_len: Ints) -> Table:
        """A table of parts of ``indices``, each from one of ``begins`` up to its ``ends``."""
        indptr = np.zeros(len(begins) + 1, np.int32)
        np.cumsum(ends - begins, out=indptr[1:])
        parts = [self.indices[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        return Table(indptr, np.concatenate(parts), last_page_len)

    def taken(self, rows: Sequence[int]) -> Table:
        """The table of ``rows``, in that order."""
        at = np.array(rows, np.int32)
        return self.cut(self.indptr[at], self.indptr[at + 1], self.last_page_len[at])

    def joined(self, other: Table) -> Table:
        """The rows of both tables, this one's first."""
        return Table(
            np.concatenate((self.indptr, self.indptr[-1] + other.indptr[1:])),
            np.concatenate((self.indices, other.indices)),
            np.concatenate((self.last_page_len, other.last_page_len)),
        )


# ---- rows that begin with the same pages -------------------------------------------------------------------------


@attrs.frozen
class Group:
    """Decode rows whose page tables share a prefix."""

    rows: tuple[int, ...]
    """The rows' numbers, at least two."""
    pages: int
    """Pages in the shared prefix, at least one; all are full, and the step writes none of them."""

    @property
    def saved(self) -> int:
        """Page reads saved when the rows attend to the prefix together."""
        return (len(self.rows) - 1) * self.pages


def common_groups(table: Table) -> tuple[Group, ...]:
    """The groups of rows that should attend to shared prefixes together, so that few pages are read.

    A row is in one group at most. A row's last page, which the step writes, is never shared. Prefixes are
    compared by page numbers.
    """
    _, at, counts = np.unique(table.indices[table.indptr[:-1]], return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[at] > 1).tolist()  # others share no page
    full = {row: table.indices[table.indptr[row] : table.indptr[row + 1] - 1] for row in rows}
    order = sorted(rows, key=lambda row: full[row].tobytes())  # rows with a common prefix become neighbours
    found, taken = [], set[int]()
    for run in _runs([_alike(full[one], full[other]) for one, other in pairwise(order)]):
        left = [i for i in range(run.first, run.end) if i not in taken]
        taken.update(left)
        found.append(Group(tuple(order[i] for i in left), run.pages))
    return tuple(found)


def groups_worth(table: Table, least: int | None) -> tuple[Group, ...]:
    """The groups of :func:`common_groups` if they save at least ``least`` page reads in all, otherwise none.

    None as ``least`` means never. The search is skipped for a table too small to save that much.
    """
    if least is None or len(table.indices) < least:
        return ()
    groups = common_groups(table)
    return groups if sum(group.saved for group in groups) >= least else ()


def _alike(one: Ints, other: Ints) -> int:
    """Length of the common prefix, in pages."""
    most = min(len(one), len(other))
    apart = np.flatnonzero(one[:most] != other[:most])
    return int(apart[0]) if len(apart) else most


@attrs.frozen
class _Run:
    """A group of neighbours from ``first`` up to ``end``, without the rows of groups inside it."""

    first: int
    end: int
    pages: int
    size: int

    @property
    def saved(self) -> int:
        return (self.size - 1) * self.pages


@attrs.define
class _Span:
    """Neighbours from ``first`` on that share ``pages`` pages, as far as they have been scanned."""

    pages: int
    first: int
    inner: tuple[_Run, ...] = ()
    """Groups of rows inside the span that share more pages."""

    def best(self, end: int) -> tuple[_Run, ...]:
        """The groups of the rows up to ``end`` that save most.

        Either the groups inside alone; or one group of all other rows, and those groups inside that save more
        than joining it would.
        """
        kept = tuple(run for run in self.inner if run.saved > run.size * self.pages)
        size = end - self.first - sum(run.size for run in kept)
        others = (*kept, _Run(self.first, end, self.pages, size)) if size > 1 else kept
        return max(others, self.inner, key=lambda runs: sum(run.saved for run in runs))


def _runs(alike: Sequence[int]) -> tuple[_Run, ...]:
    """Groups of rows in a line whose neighbours share ``alike`` pages; a group follows those inside it.

    Spans nest like the tree of prefixes. A span ends where two neighbours share less, after those inside it.
    """
    spans = [_Span(0, 0)]
    for end, pages in enumerate((*alike, 0), 1):
        first, found = end - 1, tuple[_Run, ...]()
        while spans[-1].pages > pages:
            span = spans.pop()
            span.inner += found
            first, found = span.first, span.best(end)
        if spans[-1].pages == pages:
            spans[-1].inner += found
        else:
            spans.append(_Span(pages, first, found))
    return spans[0].inner


@attrs.frozen(eq=False)
class Common:
    """The shared prefixes that a step's first decode rows attend to together, and the rest of each row."""

    qo_indptr: Ints
    """(groups + 1,): start of each group's rows in the step."""
    pages: Table
    """One row per group: the pages that its rows share, all full."""
    rest: Table
    """The tables of all decode rows without those pages; no row is empty."""

    @classmethod
    def of(cls, groups: Sequence[Group], decode: Table, page_tokens: int) -> Common:
        """The arrays of ``groups``, whose rows are the first of ``decode``, one group after another."""
        sizes = [len(group.rows) for group in groups]
        qo_indptr = np.cumsum([0, *sizes], dtype=np.int32)
        pages = np.array([group.pages for group in groups], np.int32)
        begins = decode.indptr[:-1].copy()
        heads = begins[qo_indptr[:-1]]
        begins[: qo_indptr[-1]] += np.repeat(pages, sizes)
        full = np.full(len(groups), page_tokens, np.int32)
        rest = decode.cut(begins, decode.indptr[1:], decode.last_page_len)
        return cls(qo_indptr, decode.cut(heads, heads + pages, full), rest)

    @property
    def rows(self) -> int:
        """Number of rows that are in a group: the first of the step."""
        return int(self.qo_indptr[-1])


# ---- a step's arrays ---------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class StepTables:
    """All arrays that a batch's attention needs."""

    order: tuple[int, ...]
    """Rows of the plan in the step's order: one-token rows, with groups first, then chunks."""
    decodes: int
    """Number of one-token rows."""
    decode: Table
    chunks: Table
    qo_indptr: Ints
    """(chunks + 1,): start of each chunk's tokens, counted from the first chunk's first token."""
    ids: Ints
    """(tokens,): token ids in the step's order."""
    positions: Ints
    """(tokens,): positions of the tokens."""
    batch_indices: Ints
    """(tokens,): row of each token, in the step's order."""
    wanted: Ints
    """Indices of the tokens whose logits are needed, in the step's order."""
    common: Common | None = None
    """Shared prefixes that decode rows attend to together; None: each row attends on its own."""

    @classmethod
    def of(cls, plan: BatchPlan, page_tokens: int, least: int | None = None) -> StepTables:
        """The arrays of a plan.

        ``least``: page reads that decode rows must save by attending together; None: they never do.
        """
        counts = [count(row.tokens) for row in plan.rows]
        order = sorted(range(len(counts)), key=lambda i: counts[i] > 1)  # stable
        decodes = counts.count(1)
        decode, common = Table.of([plan.rows[i] for i in order[:decodes]], page_tokens), None
        groups = groups_worth(decode, least)
        if groups:
            grouped = [row for group in groups for row in group.rows]
            first = grouped + sorted(set(range(decodes)) - set(grouped))
            order[:decodes] = [order[i] for i in first]
            decode = decode.taken(first)
            common = Common.of(groups, decode, page_tokens)
        rows = [plan.rows[i] for i in order]
        lengths = np.array([counts[i] for i in order], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        qo_indptr = np.concatenate(([0], ends[decodes:] - decodes)).astype(np.int32)
        starts = np.fromiter((row.start for row in rows), np.int32, len(rows))
        batch_indices = np.repeat(np.arange(len(rows), dtype=np.int32), lengths)
        positions = np.arange(int(ends[-1]), dtype=np.int32) + np.repeat(starts - (ends - lengths), lengths)
        return cls(
            order=tuple(order),
            decodes=decodes,
            decode=decode,
            chunks=Table.of(rows[decodes:], page_tokens),
            qo_indptr=qo_indptr,
            ids=np.frombuffer(b"".join(row.tokens for row in rows), np.int32),
            positions=positions.astype(np.int32),
            batch_indices=batch_indices,
            wanted=np.array([end - 1 for end, row in zip(ends.tolist(), rows, strict=True) if row.sample is not None], np.int32),
            common=common,
        )  # fmt: skip

    @property
    def all_rows(self) -> Table:
        """The tables of all rows, in the step's order, as append needs them."""
        return self.decode.joined(self.chunks)


def continues(rows: Sequence[Row], before: Sequence[Row], page_tokens: int) -> bool:
    """Whether ``rows`` are the decode step after ``before``: each one token further, on the same pages first.

    If so, the page tables made ahead for ``before`` hold, whatever the tokens are.
    """
    if len(rows) != len(before):
        return False
    for row, old in zip(rows, before, strict=True):  # the GPU waits: a tuple that is the same is not read
        if row.start != old.end or len(row.tokens) != TOKEN_BYTES:
            return False
        used = row.start // page_tokens + 1
        if row.pages is not old.pages and row.pages[:used] != old.pages[:used]:
            return False
    return True
