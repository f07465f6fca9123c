"""How pages of a lease become pages of the index.

All checks come first, so that a refused insert has changed nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from memserve.errors import PoolError
from memserve.mempool.leases import Lease
from memserve.mempool.nodes import Pin
from memserve.mempool.prompt_tree import PromptTree
from memserve.tokens import TOKEN_BYTES, count, span


@attrs.define
class Retired:
    """The result of an insert."""

    already_tokens: int
    new_pages: int = 0
    duplicate_pages: int = 0
    skipped_pages: int = 0
    replaced: tuple[int, ...] = ()
    """Pages in slower tiers that the index gave up for the lease's pages: they hold nothing any more."""


@attrs.define
class Retiring:
    """Inserts of one pool, into ``tree``."""

    tree: PromptTree
    caching: bool

    @property
    def page_tokens(self) -> int:
        """Tokens per page."""
        return self.tree.page_tokens

    def insert(self, lease: Lease, start: int, tokens: bytes, slots: Sequence[int]) -> Retired:
        """Retire ``tokens`` at position ``start``, from ``slots`` or, if empty, the lease's next pages.

        See ``Pool.insert``.
        """
        self._check_span(lease, start, tokens)
        self._check_repeat(lease, start, span(tokens, 0, lease.retired_tokens - start))
        if slots:
            self._arrange(lease, start, tokens, slots)
        elif start + count(tokens) > len(lease.pages) * self.page_tokens:
            text = f"insert up to {start + count(tokens)}, but lease {lease.id} has {len(lease.pages)} pages"
            raise PoolError(PoolError.DOES_NOT_FIT, text)
        repeated = min(lease.retired_tokens - start, count(tokens))
        fresh = span(tokens, repeated, count(tokens))
        return self._retire(lease, fresh, repeated) if self.caching else self._keep(lease, fresh)

    # ---- inside --------------------------------------------------------------------------------------------

    def _check_span(self, lease: Lease, start: int, tokens: bytes) -> None:
        if len(tokens) % self.tree.page_bytes or start % self.page_tokens:
            raise PoolError(
                PoolError.NOT_WHOLE_PAGES,
                f"{len(tokens)} bytes of tokens at {start} are not whole pages of {self.page_tokens} tokens",
            )
        if start < 0 or start > lease.retired_tokens:
            raise PoolError(
                PoolError.NOT_CONTIGUOUS,
                f"insert at position {start}, but lease {lease.id} has retired {lease.retired_tokens} tokens",
            )

    def _check_repeat(self, lease: Lease, start: int, repeated: bytes) -> None:
        if repeated and self.caching and not self.tree.spells(lease.pin, start, repeated):
            raise PoolError(
                PoolError.TOKENS_CHANGED, f"lease {lease.id} retired other tokens at position {start} before"
            )

    def _arrange(self, lease: Lease, start: int, tokens: bytes, slots: Sequence[int]) -> None:
        """Put the lease's table in the order of ``slots``, after the cached prefix that they begin with."""
        if len(slots) * self.page_tokens != count(tokens):
            text = f"{count(tokens)} tokens do not fill {len(slots)} pages of {self.page_tokens}"
            raise PoolError(PoolError.DOES_NOT_FIT, text)
        retired = lease.retired_tokens // self.page_tokens
        first = start // self.page_tokens
        own = set(lease.pages[retired:])
        known = list(lease.pages[first:retired])
        rest = list(slots[len(known) :])
        prefix = 0 if known or retired else next((i for i, page in enumerate(rest) if page in own), len(rest))
        fresh = rest[prefix:]
        if (
            list(slots[: len(known)]) != known[: len(slots)]
            or len(set(fresh)) < len(fresh)
            or not own.issuperset(fresh)
        ):
            raise PoolError(
                PoolError.NOT_HELD, f"lease {lease.id} does not hold these pages for these tokens"
            )
        if prefix:
            self._attach(lease, span(tokens, 0, prefix * self.page_tokens), rest[:prefix])
            retired = prefix
        taken = set(fresh)
        lease.pages[retired:] = fresh + [page for page in lease.pages[retired:] if page not in taken]

    def _attach(self, lease: Lease, tokens: bytes, slots: list[int]) -> None:
        """Put what the index holds for ``tokens``, if that is ``slots``, in front of a lease's pages.

        The lease must have retired nothing.
        """
        pin: Pin = self.tree.pin(lease.scope, tokens)
        moving = any(node.moving is not None for node in pin.node.path())
        if len(tokens) != pin.tokens * TOKEN_BYTES or self.tree.pages_of(pin) != slots or moving:
            self.tree.unpin(pin)
            code = PoolError.MOVING if moving else PoolError.NOT_HELD
            raise PoolError(
                code, f"lease {lease.id} begins with pages that the index does not hold so for these tokens"
            )
        self.tree.unpin(lease.pin)
        lease.pin, lease.retired_tokens = pin, pin.tokens
        lease.pages[:0] = slots

    def _offered(self, lease: Lease, tokens: bytes) -> list[int]:
        """The lease's own pages that hold ``tokens``, the next to be retired."""
        first = lease.retired_tokens // self.page_tokens
        return lease.pages[first : first + count(tokens) // self.page_tokens]

    def _keep(self, lease: Lease, tokens: bytes) -> Retired:
        """Retire ``tokens`` without indexing them."""
        pages = self._offered(lease, tokens)
        lease.kept += pages
        lease.retired_tokens += count(tokens)
        return Retired(0, skipped_pages=len(pages))

    def _retire(self, lease: Lease, tokens: bytes, repeated: int) -> Retired:
        """Put ``tokens`` into the index."""
        pages = self._offered(lease, tokens)
        found = self.tree.insert(lease.pin, tokens, pages)
        lease.kept += found.duplicates
        lease.retired_tokens += count(tokens)
        already = repeated + found.already_tokens
        duplicates = len(found.duplicates)
        return Retired(already, len(pages) - duplicates, duplicates, replaced=found.replaced)
