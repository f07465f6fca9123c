"""The page allocator: which page numbers of one arena are free. It never sees the arena."""

from __future__ import annotations

from collections.abc import Sequence

import attrs


@attrs.define
class Pages:
    """Fixed-size pages numbered 0 to ``count - 1``; each is free or taken, never both.

    A double free is a bug of the caller and fails an assertion before anything changes. Mistakes of a remote
    peer are refused one layer up, in :class:`~memserve.mempool.pool.Pool`.
    """

    count: int = attrs.field(validator=attrs.validators.ge(1))
    _free: list[int] = attrs.field(init=False)
    """A stack with the next page on top: pages given back last are warm in the caches and go out first."""
    _taken: bytearray = attrs.field(init=False)
    """One byte per page: 1 while the page is taken."""

    def __attrs_post_init__(self) -> None:
        self._free = list(range(self.count - 1, -1, -1))
        self._taken = bytearray(self.count)

    @property
    def free_count(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def take(self, n: int) -> list[int] | None:
        """Take ``n`` pages; None, with nothing taken, when fewer are free."""
        assert n >= 0, f"cannot take {n} pages"
        left = len(self._free) - n
        if left < 0:
            return None
        # Top of the stack first, so that pages given back together go out together and in the same order:
        # runs of neighbours survive, and a run takes one copy.
        pages = self._free[left:][::-1]
        del self._free[left:]
        taken = self._taken
        for page in pages:
            taken[page] = 1
        return pages

    def give(self, pages: Sequence[int]) -> None:
        """Give pages back. Each must be taken, and named only once."""
        taken = self._taken
        assert len(set(pages)) == len(pages), f"pages given back twice in one call: {sorted(pages)}"
        for page in pages:
            assert 0 <= page < self.count, f"page {page} given back, but there are {self.count}"
            assert taken[page], f"page {page} given back while it is not taken"
        for page in pages:
            taken[page] = 0
        self._free.extend(reversed(pages))

    def check(self) -> None:
        """Assert that the free list and the flags agree."""
        assert len(set(self._free)) == len(self._free), "a page is on the free list twice"
        assert all(0 <= page < self.count and not self._taken[page] for page in self._free), (
            "a free page is taken"
        )
        assert len(self._free) + sum(self._taken) == self.count, "a page is neither free nor taken"
