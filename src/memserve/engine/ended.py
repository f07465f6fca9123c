"""Requests that have ended at a worker, so that late messages about them are recognised."""

from __future__ import annotations

from collections import OrderedDict

import attrs

ENDED_REMEMBERED = 10_000
"""Requests remembered; beyond it, those that ended longest ago are forgotten."""


@attrs.define
class EndedAttempts:
    """The highest ended attempt of each request."""

    _attempts: OrderedDict[str, int] = attrs.field(factory=OrderedDict, init=False)

    def attempt(self, request: str) -> int:
        """The highest ended attempt of a request; -1 for none."""
        return self._attempts.get(request, -1)

    def remember(self, request: str, attempt: int) -> None:
        """Record that an attempt has ended."""
        self._attempts[request] = max(attempt, self._attempts.pop(request, -1))
        while len(self._attempts) > ENDED_REMEMBERED:
            self._attempts.popitem(last=False)
