"""Reading logs back: order, damage, one request's life, and the sums of a run."""

from __future__ import annotations

import json
import os
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from log_lines import LIFE, finished, line
from memserve import inspect
from memserve.errors import UserError
from memserve.inspect import Filter, Tally
from memserve.percentiles import percentile


@pytest.fixture
def run(tmp_path):
    """A function that writes records into a run's files by actor and returns its directory."""

    def write(*records: dict, name: str = "run1"):
        folder = tmp_path / "logs" / name
        folder.mkdir(parents=True, exist_ok=True)
        for record in records:
            with (folder / f"{record['actor'].partition('.')[0]}.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        return folder

    return write


def events(folder, wanted=None, tally=None):
    return [record["event"] for record in filter(wanted, inspect.read_run(folder, tally or Tally()))]


def test_files_are_merged_by_time(run):
    """The lines of all actors are merged by time."""
    folder = run(*reversed(LIFE[::2]), name="other") and run(*LIFE)
    assert events(folder) == [record["event"] for record in LIFE]


def test_damaged_lines_are_counted_and_passed_over(run):
    """Damaged lines are skipped and counted."""
    folder = run(*LIFE)
    with (folder / "p0.jsonl").open("ab") as file:
        file.write(
            b'garbage\n\xff\xfe\n[1]\n{"event":"x"}\n{"ts":3,"event":"x"}\n\n' + b"x" * (3 << 20) + b"\n"
        )
        file.write(json.dumps(line(50, "p0", "after the damage")).encode() + b'\n{"ts":"2026')
    tally = Tally()
    assert events(folder, tally=tally)[-1] == "after the damage"
    assert (tally.lines, tally.corrupt, tally.torn) == (9, 6, 1)
    assert tally.complaint() == "passed over 6 corrupt lines and 1 unfinished line"


@given(st.binary(max_size=200))
def test_any_bytes_can_be_read(data):
    """Any bytes can be parsed without an exception."""
    record = inspect.parse(data, Tally())
    assert record is None or "ts" in record


def test_following_shows_old_new_and_half_written_lines_once(run):
    """Following a log shows every line once, also new files and lines that are written in parts."""
    folder = run(LIFE[0])
    path = folder / "frontend-0.jsonl"
    half = json.dumps(LIFE[4]).encode()

    def append(*parts: bytes) -> None:
        with path.open("ab") as file:
            file.writelines(parts)

    later = iter([lambda: append(half[:30]), lambda: append(half[30:], b"\n"), lambda: run(LIFE[2])])

    def sleep(_seconds: float) -> None:
        next(later)()

    followed = inspect.follow(folder, Tally(), sleep)
    assert [record["event"] for record in islice(followed, 3)] == [
        "request received",
        "first token",
        "prefill started",
    ]
    followed.close()


def test_following_goes_on_when_a_file_is_emptied(run):
    """If it failed, `logs --follow` would fall silent as soon as logrotate's copytruncate had emptied a file."""
    folder = run(LIFE[0], LIFE[4])

    def sleep(_seconds: float) -> None:
        (folder / "frontend-0.jsonl").write_bytes(json.dumps(LIFE[-1]).encode() + b"\n")

    followed = inspect.follow(folder, Tally(), sleep)
    assert [record["event"] for record in islice(followed, 3)][2] == LIFE[-1]["event"]
    followed.close()


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (Filter(actor="p0"), 2),
        (Filter(actor="p0.0000"), 2),
        (Filter(actor="p"), 0),
        (Filter(actor="p0.1"), 0),
        (Filter(request="abc"), 8),
        (Filter(request="abd"), 0),
        (Filter(level="warning"), 0),
        (Filter(actor="d0", request="abc1"), 2),
    ],
)
def test_filters_narrow_by_actor_level_and_request(run, wanted, count):
    """Filters select by actor, level and request."""
    assert len(events(run(*LIFE), wanted)) == count


def test_an_actor_that_never_logged_is_an_error(run):
    """An actor without logs is refused with the names of those that have some."""
    folder = run(*LIFE)
    inspect.check_actor(folder, "p0.0000")
    with pytest.raises(UserError, match=r"--actor: .* has logs of .*p0.*, not of 'zz'"):
        inspect.check_actor(folder, "zz")


def test_a_timeline_shows_one_life_across_actors(run):
    """A timeline shows one request's events across actors, with their times."""
    folder = run(*LIFE, line(5, "p0", "prefill started", request="abcdef"))
    life = inspect.timeline(inspect.read_run(folder, Tally()), "abc1")
    assert (life.request, life.total_ms) == ("abc1", pytest.approx(40))
    assert [(moment.actor, moment.at_ms) for moment in life.moments][:3] == [
        ("frontend-0", pytest.approx(0)),
        ("scheduler-0", pytest.approx(1)),
        ("p0", pytest.approx(2)),
    ]
    assert life.moments[2].until_ms == pytest.approx(20)
    assert life.moments[2].data == {"attempt": 0, "cached_tokens": 25}


def test_an_ambiguous_or_unknown_request_is_a_users_error(run):
    """A request prefix that fits several requests, or none, is an error."""
    folder = run(*LIFE, line(5, "p0", "prefill started", request="abc2"))
    with pytest.raises(UserError, match="'abc' begins 2 requests: abc1, abc2"):
        inspect.timeline(inspect.read_run(folder, Tally()), "abc")
    with pytest.raises(UserError, match="no line of this run is about a request 'zzz'"):
        inspect.timeline(inspect.read_run(folder, Tally()), "zzz")


def test_bars_lie_where_their_time_lies():
    """Bars of the timeline lie at the place of their time."""
    assert inspect.bar(0, 5, 10, 10) == "█████·····"
    assert inspect.bar(5, 10, 10, 10) == "·····█████"
    assert inspect.bar(10, 10, 10, 10) == "·········█"
    assert inspect.bar(0, 0, 0, 4) == "█···"


def test_a_summary_counts_outcomes_times_tokens_and_workers(run):
    """A summary counts outcomes, times, tokens, workers and warnings of a run."""
    records = [line(i, "frontend-0", "request received", request=f"r{i}") for i in range(101)]
    records += [finished(1000 + i, f"r{i}", ttft_ms=float(i + 1)) for i in range(98)]
    records += [
        finished(
            2000, "r98", "error", code="overloaded", ttft_ms=None, tpot_ms=None, prefill=None, decode=None
        )
    ]
    records += [finished(2001, "r99", "cancelled", ttft_ms=99.0, prompt_tokens="?")]
    records += [line(3000, "d0", "lease expired", "warning")]
    facts = inspect.summarize(inspect.read_run(run(*records), Tally())).to_dict()
    assert facts["requests"] == {
        "received": 101,
        "finished": 100,
        "unfinished": 1,
        "resubmitted": 0,
        "outcomes": {"stop": 98, "error: overloaded": 1, "cancelled": 1},
    }
    assert facts["ttft_ms"] == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert facts["cached_share"] == pytest.approx(2500 / 9900, abs=1e-4)
    assert facts["output_tokens"] == 1000
    assert facts["workers"] == {"d0": {"prefills": 0, "decodes": 99}, "p0": {"prefills": 99, "decodes": 0}}
    assert facts["troubles"] == {"warning: lease expired": 1}
    assert facts["elapsed_s"] == 3.0


def test_the_newest_run_is_found(run, tmp_path):
    """The newest run of a log directory is found."""
    old, new = run(LIFE[0], name="b-old"), run(LIFE[0], name="a-new")
    os.utime(old / "frontend-0.jsonl", (1, 1))
    (tmp_path / "logs" / "empty").mkdir()
    assert inspect.find_run(tmp_path / "logs") == new
    assert inspect.find_run(old) == old
    with pytest.raises(UserError, match="there is no log directory"):
        inspect.find_run(tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no run"):
        inspect.find_run(tmp_path / "logs" / "empty")


def test_memory_does_not_grow_with_the_run(run):
    """Reading a long log takes a constant amount of memory."""
    import tracemalloc

    folder = run(LIFE[0])
    with (folder / "p0.jsonl").open("w") as file:
        for i in range(30_000):
            file.write(json.dumps(line(i, "p0", "steps", request=f"r{i}", text="x" * 200)) + "\n")
    tracemalloc.start()
    try:
        assert inspect.summarize(inspect.read_run(folder, Tally())).to_dict()["requests"]["received"] == 1
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(1, 100))
def test_a_percentile_is_a_value_that_occurred(values: list[float], percent: int) -> None:
    """At least that share of the values do not exceed it, and fewer do not exceed any smaller value."""
    found = percentile(sorted(values), percent)
    assert 100 * sum(one <= found for one in values) >= percent * len(values)
    assert 100 * sum(one < found for one in values) < percent * len(values)
