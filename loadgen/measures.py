"""Computes the figures of a run from its records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from loadgen.records import Record

PERCENTILES = (50, 90, 99)
ROUNDING_S = 1e-6
"""Rounding of event times in records: a run's last token may seem to arrive this long after the run's end."""
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "jct_ms")
NAMES = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token",
    "itl_ms": "inter-token latency",
    "jct_ms": "job completion time",
}
"""The latencies in words. All are milliseconds."""


@attrs.frozen
class Window:
    """The measured stretch of a run, in seconds from its start: requests that were due in it count."""

    start_s: float
    end_s: float

    @property
    def length_s(self) -> float:
        """Its length; never 0, so that rates are finite."""
        return max(self.end_s - self.start_s, 1e-9)

    def has(self, moment_s: float) -> bool:
        """Whether a moment lies in the window, whose end is included."""
        return self.start_s <= moment_s <= self.end_s + ROUNDING_S


@attrs.frozen
class Rules:
    """The limits that a run is judged by."""

    slos: Mapping[str, float] = attrs.field(factory=dict)
    """Limits in milliseconds for ttft, tpot, jct and gap."""
    stall_s: float = 5.0
    lag_limit_ms: float = 50.0


def percentiles(values: Sequence[float] | NDArray[np.float64]) -> dict[str, float] | None:
    """Count, mean, percentiles (linear between values) and maximum; None without values."""
    if len(values) == 0:
        return None
    array = np.asarray(values, float)
    found = {"count": len(array), "mean": float(array.mean())}
    found |= {
        f"p{p}": float(one) for p, one in zip(PERCENTILES, np.percentile(array, PERCENTILES), strict=True)
    }
    return found | {"max": float(array.max())}


def values(records: Iterable[Record], measure: str) -> list[float]:
    """All values of a latency in milliseconds, from complete answers only.

    Requests for which the latency is undefined (without tokens, for one) are left out.
    """
    whole = [one for one in records if one.ok]
    if measure == "itl_ms":
        return [gap for one in whole for gap in one.gaps_ms]
    found = (getattr(one, measure) for one in whole)
    return [one for one in found if one is not None]


def kept_slos(record: Record, slos: Mapping[str, float]) -> bool:
    """Whether the answer is complete and within every limit.

    Limits of a time between tokens are kept by an answer of one token; one without tokens keeps none on the
    first.
    """
    if not record.ok or ("ttft" in slos and record.ttft_ms is None):
        return False
    have = {
        "ttft": record.ttft_ms,
        "tpot": record.tpot_ms,
        "jct": record.jct_ms,
        "gap": max(record.gaps_ms, default=None),
    }
    return all((value := have[name]) is None or value <= limit for name, limit in slos.items())


def stalled(record: Record, stall_s: float) -> bool:
    """Whether the stream was ever silent for longer than ``stall_s`` between its first token and its end."""
    if not record.event_ms:
        return False
    moments = np.array([*record.event_ms, (record.end_s - record.sent_s) * 1e3])
    return bool(np.diff(moments).max(initial=0.0) > stall_s * 1e3)


def tokens_at(record: Record) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """When tokens arrived, in seconds since the run began, and how many each time.

    Servers put several tokens into one event when a client is behind, so the usage's token count is spread
    evenly over the events.
    """
    at = record.sent_s + np.asarray(record.event_ms, float) / 1e3
    count = record.output_tokens if record.output_tokens is not None else len(at)
    return at, np.full(len(at), count / max(1, len(at)))


def throughput(records: Iterable[Record], window: Window) -> dict[str, float]:
    """Rates in the window, of tokens that arrived in it and of requests that ended in it."""
    output = prompt = cached = ended = 0.0
    for one in records:
        at, count = tokens_at(one)
        output += float(count[(at >= window.start_s) & (at <= window.end_s + ROUNDING_S)].sum())
        if one.event_ms and window.has(float(at[0])):
            prompt += one.prompt_tokens or 0
            cached += one.cached_tokens or 0
        ended += one.ok and window.has(one.end_s)
    return {
        "requests_per_s": ended / window.length_s,
        "output_tokens_per_s": output / window.length_s,
        "prompt_tokens_per_s": prompt / window.length_s,
        "computed_prompt_tokens_per_s": (prompt - cached) / window.length_s,
    }


def cached_share(records: Iterable[Record]) -> float | None:
    """Cached share of prompt tokens, over requests whose usage reports both counts; None if none does."""
    known = [one for one in records if one.cached_tokens is not None and one.prompt_tokens]
    total = sum(one.prompt_tokens or 0 for one in known)
    return sum(one.cached_tokens or 0 for one in known) / total if total else None


def errors(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Number of errors of each kind, most frequent first, each with one example of its detail."""
    failed = [one for one in records if not one.ok]
    counts = Counter(one.error for one in failed)
    examples = {one.error: one.detail for one in reversed(failed)}
    return {kind: {"count": count, "example": examples[kind]} for kind, count in counts.most_common()}


def figures(records: Sequence[Record], window: Window, rules: Rules) -> dict[str, Any]:
    """All figures of these records, as plain values."""
    measured = [one for one in records if window.has(one.due_s)]
    good = sum(kept_slos(one, rules.slos) for one in measured)
    kept = sum(one.ok for one in measured)
    return {
        "requests": len(measured),
        "ok": kept,
        "errors": errors(measured),
        **{measure: percentiles(values(measured, measure)) for measure in LATENCIES},
        "throughput": throughput(records, window),
        "goodput": {
            "slos_ms": dict(rules.slos),
            "requests_per_s": good / window.length_s,
            "share": good / len(measured) if measured else None,
        },
        "cached_share": cached_share(measured),
        "prompt_tokens": percentiles(
            [one.prompt_tokens for one in measured if one.prompt_tokens is not None]
        ),
        "output_tokens": percentiles(
            [one.output_tokens for one in measured if one.output_tokens is not None]
        ),
        "short_answers": sum(one.ok and (one.output_tokens or 0) < one.asked_tokens for one in measured),
        "uncounted_answers": sum(
            one.ok and one.prompt_tokens is None and one.output_tokens == len(one.event_ms)
            for one in measured
        ),
        "stalled": {
            "after_s": rules.stall_s,
            "requests": sum(stalled(one, rules.stall_s) for one in measured),
        },
    }


def by_tenant(records: Sequence[Record], window: Window, rules: Rules) -> dict[str, dict[str, Any]]:
    """The figures of each tenant; empty if there is only one."""
    names = sorted({one.tenant for one in records})
    if len(names) < 2:
        return {}
    return {name: figures([one for one in records if one.tenant == name], window, rules) for name in names}


def send_lag(
    records: Sequence[Record], window: Window, ticks_ms: Sequence[float], rules: Rules
) -> dict[str, Any]:
    """How late the generator was in sending, and in noticing what arrived (its clock's ticks).

    A tick is how late a sleeping task was woken: a token that arrived in the meantime was timed as late.
    """
    sent = percentiles([one.lag_s * 1e3 for one in records if window.has(one.due_s)])
    ticks = percentiles(list(ticks_ms))
    worst = max((one["p99"] for one in (sent, ticks) if one), default=0.0)
    return {
        "send_ms": sent,
        "tick_ms": ticks,
        "limit_ms": rules.lag_limit_ms,
        "fell_behind": worst > rules.lag_limit_ms,
    }


def against(records: Iterable[Record], reference: Iterable[Record]) -> dict[str, Any]:
    """Compare the answers with those of another run, by session and turn.

    Answers to a different prompt (the conversation diverged earlier) are counted apart: they prove nothing.
    """
    known = {(one.session, one.turn): one for one in reference if one.ok}
    same, different, other, missing = 0, [], 0, 0
    for one in records:
        if not one.ok:
            continue
        wanted = known.get((one.session, one.turn))
        if wanted is None:
            missing += 1
        elif wanted.prompt_digest != one.prompt_digest or wanted.asked_tokens != one.asked_tokens:
            other += 1
        elif _same_answer(one, wanted):
            same += 1
        else:
            different.append({"session": one.session, "turn": one.turn, "at": _parting(one, wanted)})
    return {"same": same, "different": len(different), "other_prompt": other, "missing": missing,
            "examples": different[:10]}  # fmt: skip


def _same_answer(one: Record, wanted: Record) -> bool:
    if one.token_ids is not None and wanted.token_ids is not None:
        return one.token_ids == wanted.token_ids
    if one.answer is not None and wanted.answer is not None:
        return one.answer == wanted.answer
    return one.answer_digest == wanted.answer_digest


def _parting(one: Record, wanted: Record) -> int | None:
    """Index of the first character where two texts differ; None if the texts were not kept."""
    if one.answer is None or wanted.answer is None:
        return None
    pairs = zip(one.answer, wanted.answer, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.answer), len(wanted.answer)))
