"""Percentiles by nearest rank: always a value that occurred, never one between two."""

from __future__ import annotations

from collections.abc import Sequence


def percentile(ordered: Sequence[float], percent: int) -> float:
    """The least of ``ordered`` that at least ``percent`` percent of them do not exceed.

    ``ordered`` ascends and is not empty; ``percent`` is from 1 to 100.
    """
    return ordered[-(-len(ordered) * percent // 100) - 1]
