"""Tool calls in OpenAI's two forms: whole, and piece by piece in a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from memserve.api.call_parser import CallPart

CallId = Callable[[int], str]
"""Returns the id of a call, given its index in the answer."""


def whole_calls(parts: Iterable[CallPart], call_id: CallId) -> list[dict[str, Any]]:
    """``message.tool_calls``."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if part.name is not None:
            calls.append(_begun(part, call_id))
        calls[-1]["function"]["arguments"] += part.arguments
    return calls


def call_deltas(parts: Iterable[CallPart], call_id: CallId) -> list[dict[str, Any]]:
    """``delta.tool_calls``: the id and the name are sent once, where a call begins."""
    return [
        {"index": part.number}
        | (_begun(part, call_id) if part.name is not None else {"function": {"arguments": part.arguments}})
        for part in parts
    ]


def _begun(part: CallPart, call_id: CallId) -> dict[str, Any]:
    function = {"name": part.name, "arguments": ""}
    return {"id": call_id(part.number), "type": "function", "function": function}
