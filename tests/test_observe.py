"""Logs and metrics: what is written and in which form, and that neither ever stops the serving."""

from __future__ import annotations

import json
import logging
import os
import re
from datetime import datetime

import pytest
import structlog

from memserve import inspect, observe
from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.messages import Member
from memserve.observe import Histogram, LineFile, render_metrics


@pytest.fixture
def logged(tmp_path):
    """A function that configures logging as an actor does and returns a reader of what was written. Undone afterwards."""
    root, before = logging.getLogger(), (logging.getLogger().handlers[:], logging.getLogger().level)
    path = tmp_path / "run" / "p0.jsonl"

    def configure(level="info"):
        observe.configure(path, level, actor="p0.9f3a1c22", kind="PrefillWorker", pid=7)
        return lambda: list(inspect.read_file(path, inspect.Tally()))

    yield configure
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers[:], root.level = before


def test_a_line_says_when_who_and_what_in_a_fixed_order(logged):
    """A log line begins with time, level, event, actor, kind and pid, and has the bound request."""
    read = logged()
    with structlog.contextvars.bound_contextvars(request="r1"):
        structlog.get_logger().info("prefill finished", prefill_ms=1.5, attempt=0)
    (line,) = read()
    assert list(line)[:6] == ["ts", "level", "event", "actor", "kind", "pid"]
    assert line["ts"].endswith("Z")
    assert datetime.fromisoformat(line["ts"]).tzinfo is not None
    assert (line["level"], line["event"], line["actor"], line["pid"]) == (
        "info",
        "prefill finished",
        "p0.9f3a1c22",
        7,
    )
    assert line["request"] == "r1"


def test_lines_below_the_level_are_not_written(logged):
    """Lines below the configured level are not written."""
    read = logged("warning")
    structlog.get_logger().info("quiet")
    structlog.get_logger().error("loud")
    assert [line["event"] for line in read()] == ["loud"]


def test_exceptions_are_data_without_local_variables(logged):
    """Exceptions are logged as data without local variables, which may hold prompts and keys."""
    read = logged()
    try:
        secret = "s3cret"
        raise ValueError("boom")
    except ValueError:
        structlog.get_logger().exception("actor crashed")
    (line,) = read()
    assert line["exception"][0]["exc_type"] == "ValueError"
    assert secret not in json.dumps(line)


@pytest.mark.parametrize("value", [object(), 1 << 80, "\ud800", {1: 2}, b"\xff", float("nan"), {"a": {2}}])
def test_any_value_can_be_logged(logged, value):
    """Any value can be logged, without an exception and as a line that `memserve logs` can read."""
    read = logged()
    structlog.get_logger().info("odd", value=value)
    assert read()[0]["event"] == "odd"


def test_other_libraries_warnings_are_lines_too(logged):
    """Warnings of other libraries are written as log lines."""
    read = logged()
    logging.getLogger("some.library").warning("careful: %s", 1)
    assert [(line["library"], line["message"]) for line in read()] == [("some.library", "careful: 1")]


def test_a_full_disk_loses_lines_but_neither_the_actor_nor_the_next_line():
    """On a full disk lines are lost and counted; later ones are whole, and nothing raises."""
    disk, into = os.pipe()  # holds 64 KiB, then takes part of a line, then nothing: as a disk does
    os.set_blocking(into, False)
    sink = LineFile(into, {"actor": "p0"})
    for _ in range(2):
        sink.write(b'{"n":"' + b"1" * 70_000 + b'"}')
    assert sink.lost == 2
    os.read(disk, 1 << 20)
    sink.write(b'{"ok":1}')
    end_of_torn, notice, line = os.read(disk, 1 << 20).splitlines()
    assert end_of_torn == b""
    assert json.loads(notice)["event"] == "log lines lost"
    assert json.loads(notice)["lines"] == 2
    assert (line, sink.lost) == (b'{"ok":1}', 0)
    os.close(disk)
    os.close(into)
    sink.write(b"{}")
    assert sink.lost == 1


def test_a_log_can_be_copied_and_truncated(tmp_path):
    """As logrotate does: otherwise a file would grow for weeks, or continue behind a hole as long as it was."""
    sink = LineFile.open(tmp_path / "p0.jsonl", {})
    sink.write(b'{"n":1}')
    os.truncate(tmp_path / "p0.jsonl", 0)
    sink.write(b'{"n":2}')
    sink.close()
    assert (tmp_path / "p0.jsonl").read_bytes() == b'{"n":2}\n'


def test_an_unwritable_log_directory_is_a_users_error(tmp_path):
    """A log directory that cannot be written is a user error."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"logging\.dir: cannot write"):
        observe.configure(tmp_path / "file" / "p0.jsonl", "info", actor="p0", kind="x")


# ---- metrics -------------------------------------------------------------------------------------------------


def member(name: str, kind: str, state: str = "ready", **load: float) -> Member:
    return Member(ActorId(f"{name}.00000001"), kind, "ipc://x", 1, state, load=load)


def parse(text: bytes) -> dict[str, float]:
    """The samples by name and labels; asserts the rules of the text format."""
    samples, seen, current = {}, set(), ""
    for line in text.decode().splitlines():
        if match := re.fullmatch(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)", line):
            if match[1] == "HELP":
                assert match[2] not in seen, "a metric's lines must stand together"
                current = match[2]
                seen.add(current)
            elif current.endswith("_total"):
                assert match[3] == "counter"
            assert match[2] == current
            continue
        match = re.fullmatch(
            r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*\})? (\S+)', line
        )
        assert match, line
        assert re.sub(r"_(bucket|sum|count)$", "", match[1]) in (
            current,
            re.sub(r"_(bucket|sum|count)$", "", current),
        )
        key = match[1] + (match[2] or "")
        assert key not in samples, "each sample must be there once"
        samples[key] = float(match[3])
    assert text.endswith(b"\n")
    return samples


def test_members_load_becomes_metrics_with_actor_and_kind():
    """The load of members becomes valid Prometheus metrics with actor and kind, and vLLM's sums."""
    samples = parse(
        render_metrics(
            [
                member(
                    "p0",
                    "PrefillWorker",
                    requests_running=1.0,
                    cached_tokens_total=30.0,
                    requested_tokens_total=50.0,
                ),
                member("d0", "DecodeWorker", "draining", requests_running=2.0, requests_waiting=1.0),
                member("s0", "MemPoolShard", pages_total=10, pages_free=5, pages_evictable=3),
            ],
            {"open_connections": 3.0},
            {"actor": "frontend-0"},
        )
    )
    assert samples['memserve_requests_running{actor="d0",kind="DecodeWorker"}'] == 2
    assert samples['memserve_cached_tokens_total{actor="p0",kind="PrefillWorker"}'] == 30
    assert samples['memserve_up{actor="d0",kind="DecodeWorker"}'] == 0
    assert samples['memserve_open_connections{actor="frontend-0"}'] == 3
    assert samples["vllm:num_requests_running"] == 3
    assert samples["vllm:num_requests_waiting"] == 1
    assert samples["vllm:kv_cache_usage_perc"] == pytest.approx(0.2)
    assert samples["vllm:prefix_cache_queries_total"] == 50
    assert samples["vllm:prefix_cache_hits_total"] == 30


def test_histograms_are_cumulative():
    """Histograms are rendered as cumulative buckets, with escaped labels."""
    histogram = Histogram((0.1, 1.0))
    for value in (0.1, 0.5, 2.0):
        histogram.observe(value)
    name = "vllm:time_to_first_token_seconds"
    samples = parse(render_metrics([], {name: histogram}, {"model_name": 'a "b"\\'}))
    model = r'model_name="a \"b\"\\"'
    assert samples[f'{name}_bucket{{{model},le="0.1"}}'] == 1
    assert samples[f'{name}_bucket{{{model},le="1"}}'] == 2
    assert samples[f'{name}_bucket{{{model},le="+Inf"}}'] == 3
    assert samples[f"{name}_count{{{model}}}"] == 3
    assert samples[f"{name}_sum{{{model}}}"] == pytest.approx(2.6)
