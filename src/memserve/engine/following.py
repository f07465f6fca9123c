"""Prompts that begin alike and come together: the first computes what they share, the others find it in the index.

A burst over one document, or one system prompt, comes before any of its pages is in the index. Each prompt would compute
all of it, into pages of its own. Prompts run first come first served, so a later one loses nothing by waiting until an
earlier one is past what they share: it has no pages meanwhile, and then acquires them as any prompt does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import attrs

from memserve.engine.paging import Paging
from memserve.engine.sequence import Phase, Sequence
from memserve.tokens import TOKEN_BYTES, span

PAGES_LEAST = 4
"""What fewer pages hold is computed as soon as a later step could find them."""


@attrs.frozen
class Following:
    """Who of a worker's prompts waits for whom, and when it acquires its pages."""

    paging: Paging
    retire: str
    """Which pages go into the index: ``none``, ``prompt`` or ``all``."""

    def acquire(self, one: Sequence, live: Collection[Sequence]) -> None:
        """Ask for its pages, or let an earlier prompt that begins like it compute them first."""
        found = leader_of(one, live, self.retire, self.paging.page_tokens)
        if found is None:
            one.behind = None
            self.paging.fetch(one)
        else:
            one.behind, one.shares = found
            one.behind.followers.append(one)

    def lead_on(self, leader: Sequence, live: Collection[Sequence]) -> None:
        """Those that wait behind it: it may have what they wait for now, or be gone."""
        waiting, leader.followers = leader.followers, []
        for one in waiting:
            if one.phase is Phase.ENDED:
                continue
            if leader.phase is Phase.ENDED or leader.acknowledged >= one.shares:
                self.acquire(one, live)
            else:
                leader.followers.append(one)


def leader_of(
    one: Sequence, live: Iterable[Sequence], retire: str, page_tokens: int
) -> tuple[Sequence, int] | None:
    """Whom a prompt lets go first, and how many tokens they share; None where nobody computes enough of it.

    The most of what it shares with prompts that came before it, in whole pages, and only what those give to the index.
    Whoever came first follows nobody, so there is always one that goes on.
    """
    if retire == "none" or one.tells is not None:
        return None  # what others compute is of no use to one that has to compute it all
    shared = [(_shared(one, other, page_tokens), other) for other in live if _leads(other, one)]
    most, leader = max(shared, key=lambda pair: pair[0], default=(0, one))
    return (leader, most) if most - leader.acknowledged >= PAGES_LEAST * page_tokens else None


def _leads(other: Sequence, one: Sequence) -> bool:
    """Whether it is a prompt that came before, and computes pages that ``one`` may read."""
    computes = other.phase in (Phase.WAITING, Phase.READY) and not (other.came_with or other.dropped)
    return computes and other.order < one.order and other.request.scope == one.request.scope


def _shared(one: Sequence, other: Sequence, page_tokens: int) -> int:
    """Tokens in whole pages with which both prompts begin, leaving ``one`` a token to compute."""
    page = page_tokens * TOKEN_BYTES
    most = min(one.length - 1, other.request.prompt_tokens) // page_tokens
    if not most or one.tokens[:page] != other.tokens[:page]:
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        alike = span(one.tokens, 0, middle * page_tokens) == span(other.tokens, 0, middle * page_tokens)
        low, high = (middle, high) if alike else (low, middle - 1)
    return low * page_tokens
