"""Runs, pieces and extents: in every granularity each byte of every page moves exactly once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve.transfer.values import (
    Coverage,
    Geometry,
    PageTransfer,
    Piece,
    Run,
    extents,
    pieces,
    runs,
    spans,
    split,
)
from memserve.transfer_messages import Granularity

GEOMETRY = Geometry(page_bytes=24, layers=3)
PAGES = 12
LISTS = st.integers(1, PAGES).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, PAGES - 1), min_size=n, max_size=n),
        st.permutations(range(PAGES)).map(lambda pages: pages[:n]),
    )
)


@given(LISTS)
def test_runs_pair_the_lists_and_are_as_few_as_can_be(lists):
    """Runs pair the pages of both lists in order, and no two runs could be joined."""
    found = runs(*lists)
    paired = [(run.source + i, run.destination + i) for run in found for i in range(run.pages)]
    assert paired == list(zip(*lists, strict=True))
    for one, other in itertools.pairwise(found):
        assert (one.source + one.pages, one.destination + one.pages) != (other.source, other.destination)


def test_neighbours_are_one_run():
    """Neighbouring pages form one run."""
    assert runs((3, 4, 5, 9), (7, 8, 9, 10)) == [Run(3, 7, 3), Run(9, 10, 1)]
    assert runs((), ()) == []


@pytest.mark.parametrize("granularity", Granularity)
@given(LISTS)
def test_every_byte_moves_once_by_copies_and_by_frames(granularity, lists):
    """Copies and frames each move every byte of the pages once, to the right place."""
    transfer = PageTransfer("a.1", 1, tuple(lists[0]), tuple(lists[1]), granularity)
    parts = GEOMETRY.parts(granularity)
    size = GEOMETRY.page_bytes
    wanted = {}
    for source, destination in zip(*lists, strict=True):
        wanted |= {destination * size + i: source * size + i for i in range(size)}

    moved, framed = {}, {}
    coverage = Coverage(len(transfer.source), parts)
    for piece in pieces(transfer, GEOMETRY):
        assert coverage.add(piece)
        for one in extents(piece, transfer, GEOMETRY):
            for i in range(one.nbytes):
                assert moved.setdefault(one.destination + i, one.source + i) == one.source + i
        for frame in split(piece, 2):
            sides = [
                [start + i for start, n in spans(frame, pages, size, parts) for i in range(n)]
                for pages in (transfer.destination, transfer.source)
            ]
            framed |= dict(zip(*sides, strict=True))
    assert moved == framed == wanted
    assert coverage.complete


def test_repeats_count_once_and_other_pieces_are_refused():
    """Repeated pieces count once, and pieces outside of the transfer are refused."""
    coverage = Coverage(pages=3, parts=2)
    assert coverage.add(Piece(0, 2, 0)) and not coverage.add(Piece(1, 1, 0))
    assert coverage.add(Piece(0, 3, 1)) and not coverage.complete
    for wrong in (Piece(-1, 1), Piece(3, 1), Piece(2, 2), Piece(0, 0), Piece(0, 1, 2), Piece(0, 1, -1)):
        with pytest.raises(ValueError, match="not within 3 pages of 2 parts"):
            coverage.add(wrong)
    assert coverage.add(Piece(1, 2, 0)) and coverage.complete


@pytest.mark.parametrize(
    ("source", "destination", "text"),
    [((), (), "at least 1"), ((1, 2), (1,), "from 2 pages to 1"), ((1, 2), (3, 3), "twice")],
)
def test_a_transfer_pairs_pages(source, destination, text):
    """A transfer needs as many source as destination pages, at least one and none twice."""
    with pytest.raises(ValueError, match=text):
        PageTransfer("a.1", 1, source, destination)


def test_a_page_divides_into_its_layers():
    """A page size that its layers do not divide is refused."""
    with pytest.raises(ValueError, match="100 bytes does not divide into K and V of 3 layers"):
        Geometry(100, 3)
