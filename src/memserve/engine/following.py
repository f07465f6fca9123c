"""Concurrent prompts that share a prefix: the first computes the prefix, the others find it in the index.

A burst of prompts over one document, or one system prompt, arrives before any page of it is in the index.
Without this module each prompt would compute the whole prefix into pages of its own. Prompts run first come
first served, so a later prompt loses nothing by waiting until an earlier one has computed the shared prefix.
It holds no pages while it waits, and then acquires them as any prompt does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import attrs

from memserve.engine.paging import Paging
from memserve.engine.sequence import Phase, Sequence
from memserve.tokens import TOKEN_BYTES, span

PAGES_LEAST = 4
"""Least number of shared pages left to compute for which waiting pays.

Fewer are computed by the time that a later step could find them.
"""


@attrs.frozen
class Following:
    """Decides which of a worker's prompts waits for which other, and when it acquires its pages."""

    paging: Paging
    retire: str
    """Which pages go into the index: ``none``, ``prompt`` or ``all``."""

    def acquire(self, one: Sequence, live: Collection[Sequence]) -> None:
        """Acquire its pages, or let it wait while an earlier prompt computes a prefix that they share."""
        found = leader_of(one, live, self.retire, self.paging.page_tokens)
        if found is None:
            one.behind = None
            self.paging.fetch(one)
        else:
            one.behind, one.shares = found
            one.behind.followers.append(one)

    def lead_on(self, leader: Sequence, live: Collection[Sequence]) -> None:
        """Let followers acquire pages: those whose prefix ``leader`` has indexed, or all if it has ended."""
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
    """The earlier prompt to wait for, and how many tokens they share; None if waiting does not pay.

    The leader is the earlier prompt with the longest shared prefix, in whole pages of its prompt. Only
    prompts that give pages to the index lead. The earliest prompt follows none, so one always makes progress.
    """
    if retire == "none" or one.score_count is not None:
        return None  # nothing is indexed, or this prompt must compute all its KV itself
    shared = [(_shared(one, other, page_tokens), other) for other in live if _leads(other, one)]
    most, leader = max(shared, key=lambda pair: pair[0], default=(0, one))
    return (leader, most) if most - leader.acknowledged >= PAGES_LEAST * page_tokens else None


def _leads(other: Sequence, one: Sequence) -> bool:
    """Whether ``other`` is a prompt that arrived earlier and computes pages that ``one`` may read."""
    computes = other.phase in (Phase.WAITING, Phase.READY) and not (other.came_with or other.dropped)
    return computes and other.order < one.order and other.request.scope == one.request.scope


def _shared(one: Sequence, other: Sequence, page_tokens: int) -> int:
    """Length in tokens of the shared prefix: whole pages that leave ``one`` at least one token to compute."""
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
