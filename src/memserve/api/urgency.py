"""How urgent a request is: its priority and its deadline, and which of these its key may ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs

from memserve.api.bodies import ChatBody, CompletionBody
from memserve.api.errors import ApiError
from memserve.api.guard import Caller
from memserve.api.prompts import Prompt

TTFT_HEADER = "x-slo-ttft-ms"
"""Header with the deadline for the first token, named as inference gateways do (llm-d, Gateway API)."""
TTFT_MS_MAX = 86_400_000


def with_urgency(
    prompts: Sequence[Prompt],
    body: CompletionBody | ChatBody,
    header: str | None,
    caller: Caller,
    default_ttft_ms: float | None,
) -> list[Prompt]:
    """The prompts with the requested priority and deadline. Raises ApiError (400, 403)."""
    priority = body.priority or 0
    if priority < 0 and not caller.may_hurry:
        message = f"priority: this key may use 0 and above, got {priority}; frontend.priority_keys names those that may go below"
        raise ApiError(message, "priority", 403, "priority_not_allowed")
    ttft_ms = default_ttft_ms if header is None else read_ttft_ms(header)
    ttft_s = None if ttft_ms is None else ttft_ms / 1e3
    return [
        attrs.evolve(one, params=attrs.evolve(one.params, priority=priority, ttft_s=ttft_s))
        for one in prompts
    ]


def read_ttft_ms(header: str) -> float:
    """The header's value, in milliseconds. Raises ApiError (400)."""
    try:
        value = float(header)
    except ValueError:
        value = math.nan
    if not 0 < value <= TTFT_MS_MAX:
        rule = f"expected milliseconds, above 0 and at most {TTFT_MS_MAX}"
        raise ApiError(f"{TTFT_HEADER}: {rule}, got {header[:60]!r}", TTFT_HEADER, code="invalid_value")
    return value
