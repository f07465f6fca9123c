"""Expected answer lengths, learned by tenant: what a placement will cost after its first token."""

from __future__ import annotations

from collections import OrderedDict

import attrs

from memserve.messages import Request
from memserve.tokens import count

UNKNOWN_TOKENS = 128.0
"""Expected tokens before anything is known of a tenant."""
WEIGHT = 0.05
"""Weight of the latest answer against all before it."""
TENANTS_MAX = 10_000


@attrs.define
class OutputLengths:
    """Moving averages by tenant; the most recently updated tenants are kept."""

    _means: OrderedDict[str, float] = attrs.field(factory=OrderedDict)

    def learn(self, tenant: str, tokens: int) -> None:
        """Take in an answer of ``tokens`` tokens."""
        mean = self._means.pop(tenant, UNKNOWN_TOKENS)
        self._means[tenant] = mean + WEIGHT * (tokens - mean)
        if len(self._means) > TENANTS_MAX:
            self._means.popitem(last=False)

    def expect(self, request: Request) -> float:
        """Expected new tokens of this attempt; at least 1."""
        left = request.max_tokens - (count(request.tokens) - request.prompt_tokens)
        return max(1.0, min(float(left), self._means.get(request.tenant, UNKNOWN_TOKENS)))
