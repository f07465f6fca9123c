"""How long answers are, learned by tenant: what a placement will cost after its first token."""

from __future__ import annotations

from collections import OrderedDict

import attrs

from memserve.messages import Request
from memserve.tokens import count

UNKNOWN_TOKENS = 128.0
"""Before anything is known of a tenant."""
WEIGHT = 0.05
"""Of the newest answer against all before it."""
TENANTS_MAX = 10_000


@attrs.define
class OutputLengths:
    """Moving means by scope; the scopes heard of last are kept."""

    _means: OrderedDict[str, float] = attrs.field(factory=OrderedDict)

    def learn(self, scope: str, tokens: int) -> None:
        """An answer had so many tokens."""
        mean = self._means.pop(scope, UNKNOWN_TOKENS)
        self._means[scope] = mean + WEIGHT * (tokens - mean)
        if len(self._means) > TENANTS_MAX:
            self._means.popitem(last=False)

    def expect(self, request: Request) -> float:
        """New tokens that this attempt will make; at least one."""
        left = request.max_tokens - (count(request.tokens) - request.prompt_tokens)
        return max(1.0, min(float(left), self._means.get(request.scope, UNKNOWN_TOKENS)))
