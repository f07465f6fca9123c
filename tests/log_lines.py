"""Log lines for tests that read logs: the life of one request, and functions that make other lines."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

START = datetime(2026, 1, 1, tzinfo=UTC)


def line(at_ms: float, actor: str, event: str, level: str = "info", **data) -> dict:
    """One record as an actor writes it."""
    ts = (START + timedelta(milliseconds=at_ms)).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return {
        "ts": ts,
        "level": level,
        "event": event,
        "actor": f"{actor}.00000001",
        "kind": "K",
        "pid": 1,
        **data,
    }


def finished(at_ms: float, request: str, outcome: str = "stop", **data) -> dict:
    """A canonical ``request finished`` line of the Frontend."""
    base = {"prompt_tokens": 100, "cached_tokens": 25, "output_tokens": 10, "ttft_ms": 20.0, "tpot_ms": 2.0}
    base |= {"total_ms": 40.0, "prefill": "p0.00000001", "decode": "d0.00000001"}
    return line(at_ms, "frontend-0", "request finished", request=request, outcome=outcome, **(base | data))


LIFE = (
    line(0, "frontend-0", "request received", request="abc1", attempt=0, prompt_tokens=100, max_tokens=10),
    line(
        1,
        "scheduler-0",
        "request placed",
        request="abc1",
        attempt=0,
        prefill="p0.1",
        decode="d0.1",
        policy="least_load",
    ),
    line(2, "p0", "prefill started", request="abc1", attempt=0, cached_tokens=25),
    line(20, "p0", "prefill finished", request="abc1", attempt=0, prefill_ms=18.0),
    line(20.5, "frontend-0", "first token", request="abc1", attempt=0, ttft_ms=20.5),
    line(21, "d0", "decode started", request="abc1", attempt=0, handoff_ms=1.0),
    line(40, "d0", "decode finished", request="abc1", attempt=0, output_tokens=10, decode_ms=19.0),
    finished(40, "abc1", attempt=0),
)
