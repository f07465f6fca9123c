"""FlashInfer's index arrays compared with what they mean, position by position."""

from __future__ import annotations

from itertools import takewhile

import attrs
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.drawing import Sampling
from memserve.engine.plans import BatchPlan, Row
from memserve.kernels.page_tables import (
    BUCKETS,
    StepTables,
    Table,
    bucket_of,
    buckets_up_to,
    common_groups,
    continues,
    groups_worth,
)
from memserve.tokens import count, pack, pages_for, unpack

GREEDY = Sampling(temperature=0.0)


@st.composite
def plans(draw: st.DrawFn) -> tuple[BatchPlan, int]:
    """Rows of any lengths, each with its own pages, and the page size."""
    page_tokens = draw(st.sampled_from([8, 16, 32]))
    rows, page = [], 0
    for length, start, spare, wanted in draw(
        st.lists(
            st.tuples(st.sampled_from([1, 1, 1, 2, 7, 40]), st.integers(0, 90), st.integers(0, 2), st.booleans()),
            min_size=1, max_size=12,
        )
    ):  # fmt: skip
        pages = tuple(range(page, page + pages_for(start + length, page_tokens) + spare))
        page += len(pages)
        tokens = pack(range(1000 * len(rows), 1000 * len(rows) + length))
        rows.append(Row(tokens, start, pages[::-1], GREEDY if wanted else None))
    return BatchPlan(tuple(rows)), page_tokens


@st.composite
def plans_alike(draw: st.DrawFn) -> tuple[BatchPlan, int]:
    """Decode rows and chunks whose page tables begin with branches of one tree of pages and continue with other pages."""
    page_tokens = draw(st.sampled_from([1, 16]))
    tree: dict[tuple[int, ...], int] = {}
    rows = []
    for branch, own, length in draw(
        st.lists(
            st.tuples(st.lists(st.integers(0, 1), max_size=5), st.integers(1, 40), st.sampled_from([1, 1, 1, 3])),
            min_size=1, max_size=7,
        )
    ):  # fmt: skip
        shared = [tree.setdefault(tuple(branch[: i + 1]), len(tree)) for i in range(len(branch))]
        pages = range(1000 * (len(rows) + 1), 1000 * (len(rows) + 1) + pages_for(own + length, page_tokens))
        start = len(shared) * page_tokens + own
        rows.append(Row(pack([7] * length), start, (*shared, *pages), GREEDY))
    return BatchPlan(tuple(rows)), page_tokens


def positions_of(table: Table, row: int, page_tokens: int) -> list[tuple[int, int]]:
    """Page and slot of every position that FlashInfer sees in a row: the meaning of its three arrays."""
    pages = table.indices[table.indptr[row] : table.indptr[row + 1]].tolist()
    length = (len(pages) - 1) * page_tokens + int(table.last_page_len[row])
    return [(pages[i // page_tokens], i % page_tokens) for i in range(length)]


@settings(deadline=None)  # a busy machine is no fault of the arrays
@given(plans() | plans_alike(), st.sampled_from([None, 1, 10**6]))
def test_the_arrays_mean_what_the_plan_says(case, least):
    """The arrays give each row the pages, positions and tokens of the plan."""
    plan, page_tokens = case
    tables = StepTables.of(plan, page_tokens, least)
    rows = [plan.rows[i] for i in tables.order]
    assert sorted(tables.order) == list(range(len(plan.rows)))
    assert [count(row.tokens) == 1 for row in rows] == [i < tables.decodes for i in range(len(rows))]

    token = 0
    for number, row in enumerate(rows):
        expected = [(row.pages[i // page_tokens], i % page_tokens) for i in range(row.end)]
        assert positions_of(tables.all_rows, number, page_tokens) == expected
        own, at = (
            (tables.decode, number) if number < tables.decodes else (tables.chunks, number - tables.decodes)
        )
        assert positions_of(own, at, page_tokens) == expected
        for offset, id in enumerate(unpack(row.tokens)):
            assert (tables.ids[token], tables.positions[token]) == (id, row.start + offset)
            assert tables.batch_indices[token] == number
            token += 1
        if number >= tables.decodes:
            begin, end = tables.qo_indptr[at : at + 2].tolist()
            assert (end - begin, end + tables.decodes) == (count(row.tokens), token)
    wanted = [row for row in rows if row.sample is not None]
    assert [tables.batch_indices[at] for at in tables.wanted] == [rows.index(row) for row in wanted]
    assert all(tables.positions[at] == row.end - 1 for at, row in zip(tables.wanted, wanted, strict=True))
    arrays = [tables.qo_indptr, tables.ids, tables.positions, tables.batch_indices, tables.wanted]
    some = (tables.common.pages, tables.common.rest) if tables.common else ()
    for table in (tables.decode, tables.chunks, tables.all_rows, *some):
        arrays += [table.indptr, table.indices, table.last_page_len]
        assert ((table.last_page_len >= 1) & (table.last_page_len <= page_tokens)).all()
    assert {array.dtype for array in arrays} == {np.dtype(np.int32)}


def begun_alike(tables: list[tuple[int, ...]]) -> int:
    """How many pages all of the tables begin with."""
    return sum(1 for _ in takewhile(lambda pages: len(set(pages)) == 1, zip(*tables, strict=False)))


def most_spared(tables: list[tuple[int, ...]]) -> int:
    """The pages that the best of all possible groupings saves."""
    if not tables:
        return 0
    first, *others = tables
    best = 0
    for chosen in range(1 << len(others)):
        group = [first, *(one for i, one in enumerate(others) if chosen >> i & 1)]
        left = [one for i, one in enumerate(others) if not chosen >> i & 1]
        pages = begun_alike(group)
        best = max(best, (len(group) - 1) * pages + most_spared(left))
    return best


@settings(deadline=None)  # a busy machine is no fault of the groups
@given(plans_alike())
def test_groups_spare_nearly_the_most_and_leave_each_row_its_last_page(case):
    """Groups share full pages only and save at least 80 % of what the best grouping saves."""
    plan, page_tokens = case
    rows = [row for row in plan.rows if count(row.tokens) == 1]
    full = [row.pages[: pages_for(row.end, page_tokens) - 1] for row in rows]
    table = Table.of(rows, page_tokens)
    groups = common_groups(table)
    for group in groups:
        assert len(group.rows) > 1 and group.pages == begun_alike([full[row] for row in group.rows]) > 0
    grouped = [row for group in groups for row in group.rows]
    assert len(set(grouped)) == len(grouped)
    spared = sum(group.saved for group in groups)
    assert 0.8 * most_spared(full) <= spared <= most_spared(full)
    assert groups_worth(table, spared) == groups and groups_worth(table, None) == ()
    assert groups_worth(table, spared + 1) == ()


@settings(deadline=None)  # a busy machine is no fault of the arrays
@given(plans_alike())
def test_a_common_part_and_the_rest_are_each_row_once(case):
    """The common part and the rest together cover each position of a row exactly once."""
    plan, page_tokens = case
    tables = StepTables.of(plan, page_tokens, 1)
    common = tables.common
    if common is None:
        assert not common_groups(tables.decode)
        return
    sizes = np.diff(common.qo_indptr).tolist()
    part_of = [group for group, size in enumerate(sizes) for _ in range(size)]
    assert len(part_of) == common.rows <= tables.decodes and min(sizes) > 1
    for row in range(tables.decodes):
        shared = positions_of(common.pages, part_of[row], page_tokens) if row < common.rows else []
        rest = positions_of(common.rest, row, page_tokens)
        assert rest and shared + rest == positions_of(tables.decode, row, page_tokens)


def test_a_document_goes_before_the_system_prompt_that_all_begin_with():
    """Rows with one long document are grouped by it, although all rows share a system prompt."""
    tables = [(0, *range(10, 50), 100 + i) for i in range(3)] + [(0, 200 + i) for i in range(4)]
    tables += [
        (0, 300, 400 + i) for i in range(2)
    ]  # sharing their second page saves less than being in the large group
    rows = [Row(pack([1]), 16 * len(pages) - 1, pages, GREEDY) for pages in tables]
    groups = {group.rows: group.pages for group in common_groups(Table.of(rows, 16))}
    assert {tuple(sorted(rows)): pages for rows, pages in groups.items()} == {
        (0, 1, 2): 41,
        (3, 4, 5, 6, 7, 8): 1,
    }


def test_a_long_chain_of_prefixes_is_no_burden():
    """A thousand rows, each of which continues the one before it, are grouped without deep recursion."""
    rows = [Row(pack([1]), turn + 1, (*range(turn + 1), 10**6 + turn), GREEDY) for turn in range(1000)]
    groups = common_groups(Table.of(rows, 1))
    # The last 500 or so have the first 500 pages in common: n rows spare (n - 1) * (1001 - n) pages.
    assert sum(group.saved for group in groups) >= 500 * 500


@settings(deadline=None)  # a busy machine is no fault of the arrays
@given(plans(), st.integers(0, 5))
def test_padding_rows_see_only_the_scratch_page(case, more):
    """Padding rows refer to the scratch page only."""
    plan, page_tokens = case
    table = StepTables.of(plan, page_tokens).all_rows
    rows = len(plan.rows)
    padded = table.padded(rows + more, 10**6)
    for row in range(rows):
        assert positions_of(padded, row, page_tokens) == positions_of(table, row, page_tokens)
    for row in range(rows, rows + more):
        assert positions_of(padded, row, page_tokens) == [(10**6, 0)]


def test_every_batch_has_a_bucket_that_is_not_much_larger():
    """Every number of rows up to the limit has a bucket of at most twice its size."""
    for most in (1, 3, 64, 65, 1000, 1024):
        buckets = buckets_up_to(most)
        assert list(buckets) == sorted(set(buckets)) and set(buckets) <= set(BUCKETS)
        for rows in range(1, most + 1):
            bucket = bucket_of(rows, buckets)
            assert bucket is not None and rows <= bucket <= max(2 * rows, 1) and bucket - rows < max(8, rows)
        assert bucket_of(buckets[-1] + 1, buckets) is None


@settings(deadline=None)  # a busy machine is no fault of the arrays
@given(plans())
def test_the_next_step_is_recognised_only_when_it_is_the_next(case):
    """A step counts as the planned next one only if it has the same rows, positions and pages."""
    plan, page_tokens = case
    before = [row for row in plan.rows if len(row.pages) >= pages_for(row.end + 1, page_tokens)]
    after = [Row(pack([7]), row.end, row.pages, row.sample) for row in before]
    assert continues(after, before, page_tokens)
    ahead = Table.of([Row(pack([0]), row.end, row.pages, None) for row in before], page_tokens)
    real = Table.of(after, page_tokens)
    for one, other in zip(
        attrs.astuple(ahead, recurse=False), attrs.astuple(real, recurse=False), strict=True
    ):
        assert (one == other).all()
    if after:
        first = after[0]
        for wrong in (
            Row(first.tokens, first.start + 1, (*first.pages, 10**6, 10**6 + 1), None),
            Row(first.tokens, first.start, (10**6, *first.pages[1:]), None),
            Row(pack([1, 2]), first.start, (*first.pages, 10**6), None),
        ):
            assert not continues([wrong, *after[1:]], before, page_tokens)
        assert not continues(after[1:], before, page_tokens)
