"""What a transfer is made of, as values: runs of adjacent pages, parts of pages, results.

A transfer is a list of pages of one arena and an equally long list of pages of another. A page's bytes are
``[layers, 2, kv_heads, page_tokens, head_dim]``, so the page, each of its layers, and each layer's K or V are
contiguous blocks. The granularity says in which of these a transfer moves (after MemServe, section 5.2):

===========  ============  =================================================================================
aggregated   whole pages   adjacent pages travel together: one copy, or a few large frames, per run
by_layer     one layer     layer by layer over all pages; the only one that can start before the pages are full
by_request   one K or V    every block by itself: the paper's ``2 * layers`` operations per page; for comparison
===========  ============  =================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from memserve.identity import ActorId
from memserve.transfer_messages import Failure, Granularity


@attrs.frozen
class TransferDone:
    """Every byte is in the receiver's pages."""

    id: int
    nbytes: int
    pages: tuple[int, ...] = ()
    """The receiver's pages, as it granted them."""
    lease: int = 0
    """The lease that holds the pages at the receiver."""


@attrs.frozen
class TransferFailed:
    """The transfer has ended without its pages, and why."""

    id: int
    failure: Failure
    message: str
    code: str = ""
    """The PoolError's code, where the receiver's pool refused the pages."""


Result = TransferDone | TransferFailed


@attrs.frozen
class Geometry:
    """How a page divides into parts.

    Raises ValueError unless ``page_bytes`` is a multiple of ``2 * layers``.
    """

    page_bytes: int
    layers: int

    def __attrs_post_init__(self) -> None:
        if self.page_bytes < 1 or self.layers < 1 or self.page_bytes % (2 * self.layers):
            raise ValueError(
                f"a page of {self.page_bytes} bytes does not divide into K and V of {self.layers} layers"
            )

    def parts(self, granularity: Granularity) -> int:
        """Number of equal parts that a page is cut into."""
        match granularity:
            case Granularity.AGGREGATED:
                return 1
            case Granularity.BY_LAYER:
                return self.layers
            case Granularity.BY_REQUEST:
                return 2 * self.layers


@attrs.frozen
class PageTransfer:
    """``source[i]`` of the sender's arena goes to ``destination[i]`` of the receiver's.

    ``(sender, id)`` identifies it and is never reused: a sender's ids only grow within its incarnation.
    Raises ValueError for lists of different lengths, an empty list, or a page named twice in ``destination``.
    """

    sender: ActorId
    id: int
    source: tuple[int, ...]
    destination: tuple[int, ...]
    granularity: Granularity = Granularity.AGGREGATED

    def __attrs_post_init__(self) -> None:
        if not self.source or len(self.source) != len(self.destination):
            raise ValueError(
                f"transfer {self.id} goes from {len(self.source)} pages to {len(self.destination)}; "
                "the numbers must be equal and at least 1"
            )
        if len(set(self.destination)) < len(self.destination):
            raise ValueError(f"transfer {self.id} names a destination page twice")


ON_ONE_HOST = frozenset({"mapped", "cuda"})
"""Paths between processes of one host only: there, a sender that is presumed dead can be killed for good."""
WRITTEN_BY_SENDER = ON_ONE_HOST | {"nixl"}
"""Paths on which the sender stores into the receiver's memory itself.

The receiver cannot stop the writes, so its pages stay taken until the sender has stopped, by its own word, or
is dead.
"""


# ---- runs ----------------------------------------------------------------------------------------------------


@attrs.frozen
class Run:
    """``pages`` pages that are adjacent on both sides, in the same order."""

    source: int
    destination: int
    pages: int


def runs(source: Sequence[int], destination: Sequence[int]) -> list[Run]:
    """The fewest runs that pair ``source[i]`` with ``destination[i]``, in the lists' order."""
    found: list[Run] = []
    start = 0
    for i in range(1, len(source) + 1):
        ends = i == len(source)
        if ends or source[i] != source[i - 1] + 1 or destination[i] != destination[i - 1] + 1:
            found.append(Run(source[start], destination[start], i - start))
            start = i
    return found


# ---- pieces --------------------------------------------------------------------------------------------------


@attrs.frozen
class Piece:
    """Part ``part`` of each of ``pages`` pages, from position ``first`` of the transfer's lists on."""

    first: int
    pages: int
    part: int = 0


@attrs.frozen
class Extent:
    """``nbytes`` contiguous bytes, by their offsets in the two arenas."""

    source: int
    destination: int
    nbytes: int


def pieces(transfer: PageTransfer, geometry: Geometry) -> tuple[Piece, ...]:
    """All pieces of a transfer whose pages are all full, cut as its granularity says."""
    pages, parts = len(transfer.source), geometry.parts(transfer.granularity)
    if transfer.granularity is Granularity.BY_REQUEST:
        return tuple(Piece(page, 1, part) for page in range(pages) for part in range(parts))
    return tuple(Piece(0, pages, part) for part in range(parts))


def split(piece: Piece, pages_max: int) -> Iterator[Piece]:
    """Split a piece into pieces of at most ``pages_max`` pages."""
    end = piece.first + piece.pages
    for first in range(piece.first, end, pages_max):
        yield Piece(first, min(pages_max, end - first), piece.part)


def extents(piece: Piece, transfer: PageTransfer, geometry: Geometry) -> list[Extent]:
    """The copies that a piece takes: one per run of whole pages; for parts of pages, one per page."""
    span = slice(piece.first, piece.first + piece.pages)
    parts = geometry.parts(transfer.granularity)
    size = geometry.page_bytes
    found = runs(transfer.source[span], transfer.destination[span])
    if parts == 1:
        return [Extent(run.source * size, run.destination * size, run.pages * size) for run in found]
    part_bytes = size // parts
    shift = piece.part * part_bytes
    return [
        Extent((run.source + i) * size + shift, (run.destination + i) * size + shift, part_bytes)
        for run in found
        for i in range(run.pages)
    ]


def spans(piece: Piece, pages: Sequence[int], page_bytes: int, parts: int) -> list[tuple[int, int]]:
    """(offset, bytes) of a piece in one arena, with ``pages`` its list there; adjacent ranges are joined."""
    part_bytes = page_bytes // parts
    shift = piece.part * part_bytes
    found: list[tuple[int, int]] = []
    for page in pages[piece.first : piece.first + piece.pages]:
        start = page * page_bytes + shift
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + part_bytes)
        else:
            found.append((start, part_bytes))
    return found


@attrs.define
class Coverage:
    """Which parts of which pages are covered. Repeats are allowed and count once."""

    pages: int
    parts: int
    _there: bytearray = attrs.field(init=False)
    _missing: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._missing = self.pages * self.parts
        self._there = bytearray(self._missing)

    @property
    def complete(self) -> bool:
        """Whether every part of every page is covered."""
        return self._missing == 0

    def holds(self, piece: Piece) -> bool:
        """Whether a piece lies within the transfer."""
        inside = piece.first >= 0 and piece.pages >= 1 and piece.first + piece.pages <= self.pages
        return inside and 0 <= piece.part < self.parts

    def add(self, piece: Piece) -> bool:
        """Mark a piece as covered; whether any of it is new.

        Raises ValueError for one that is not in the transfer.
        """
        if not self.holds(piece):
            raise ValueError(f"{piece} is not within {self.pages} pages of {self.parts} parts")
        start = piece.part * self.pages + piece.first
        new = self._there[start : start + piece.pages].count(0)
        self._missing -= new
        self._there[start : start + piece.pages] = b"\1" * piece.pages
        return new > 0
