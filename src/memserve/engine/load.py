"""How busy a worker is, as its heartbeats say it and schedulers price it."""

from __future__ import annotations

from collections.abc import Collection

from memserve.engine.sequence import Phase, Sequence
from memserve.messages import ActorId

_TO_RUN = (Phase.WAITING, Phase.READY)
"""Phases in which a prompt is still to be run here."""


def load_of(live: Collection[Sequence], me: ActorId) -> dict[str, float]:
    """Gauges of the sequences that worker ``me`` holds."""
    phases = [one.phase for one in live]
    prompts = [one for one in live if not one.decoding and one.phase in _TO_RUN]
    kept = [one for one in live if one.plan.decode == me]
    return {
        "requests_running": float(phases.count(Phase.READY)),
        "requests_waiting": float(phases.count(Phase.WAITING) + phases.count(Phase.ADOPTING)),
        "requests_leaving": float(phases.count(Phase.LEAVING)),
        "waiting_tokens": float(sum(one.length - one.computed for one in prompts)),
        # Each token to run attends to all before it: the quadratic part of what waits.
        "waiting_pairs": float(sum((one.length**2 - one.computed**2) // 2 for one in prompts)),
        # Streams that are, or will be, continued here, whoever runs their prompt.
        "decode_rows": float(len(kept)),
        "context_tokens": float(sum(one.length for one in kept)),
    }
