"""Statistics of runs: percentiles, goodput, windows, and comparisons with confidence intervals."""

from __future__ import annotations

import attrs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen import compare, measures, plots, records, report
from loadgen.errors import LoadgenError
from loadgen.measures import Rules, Window
from loadgen.records import Record
from loadgen.rundir import Run


def record(
    session: int = 0,
    *,
    sent_s: float = 0.0,
    ttft_ms: float = 100.0,
    gap_ms: float = 10.0,
    tokens: int = 5,
    **more,
) -> Record:
    """A request with evenly spaced tokens."""
    events = [ttft_ms + gap_ms * i for i in range(tokens)]
    end_s = sent_s + (events[-1] if events else ttft_ms) / 1e3
    answered = {"output_tokens": tokens, "prompt_tokens": 100, "cached_tokens": 40} | more
    return Record(str(session), 0, "", sent_s, sent_s, tokens, end_s=end_s, event_ms=events, **answered)


def run(found: list[Record], label: str = "a", **identity) -> Run:
    """A run with these requests."""
    window = Window(0.0, max(one.end_s for one in found))
    summary = {
        "label": label,
        "loadgen": "0",
        "started": "now",
        "machine": {"system": "test"},
        "server": {"model": "m", "url": "u"},
        "arrivals": {"text": "closed", "rate": 1.0, "clients": 1},
        "workload": {"name": "w", "sessions": 1, "requests": len(found), "options": {}},
        "identity": {"workload": "x", "arrivals": "closed"} | identity,
        "window": {"start_s": window.start_s, "end_s": window.end_s},
        "outcome": {},
        "lag": measures.send_lag(found, window, [0.1], Rules()),
        "figures": measures.figures(found, window, Rules({"ttft": 200.0})),
        "tenants": {},
        "warnings": ["mind <this>"],
    }
    return Run(summary, found)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_percentiles_lie_between_the_values(values):
    """Percentiles are ordered and lie between the smallest and largest value."""
    found = measures.percentiles(values)
    assert min(values) <= found["p50"] <= found["p90"] <= found["p99"] <= found["max"] == max(values)
    assert found["count"] == len(values) and found["mean"] == pytest.approx(np.mean(values))
    assert measures.percentiles([]) is None


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=60), st.integers(1, 99))
def test_a_bootstrap_percentile_with_equal_weights_is_the_percentile(values, percent):
    """With equal weights, the bootstrap's percentile and mean are the ordinary ones."""
    sample = compare.Sample(np.array(values), np.arange(len(values)))
    (found,) = sample.percentile(np.ones((1, len(values))), percent)
    assert found == np.percentile(values, percent, method="inverted_cdf")
    (mean,) = sample.mean(np.ones((1, len(values))))
    assert mean == pytest.approx(np.mean(values))


def test_latencies_of_one_request():
    """TTFT, time per token, job completion time and gaps of one request are computed as their names say."""
    one = record(ttft_ms=100, gap_ms=20, tokens=4)
    assert (one.ttft_ms, one.tpot_ms, one.jct_ms) == (100, 20, pytest.approx(160))
    assert one.gaps_ms == [20, 20, 20]
    single = record(tokens=1)
    assert single.tpot_ms is None and single.gaps_ms == []
    assert attrs.evolve(one, output_tokens=7).tpot_ms == 10
    assert attrs.evolve(one, output_tokens=7, first_tokens=4).tpot_ms == 20
    assert attrs.evolve(one, output_tokens=4, first_tokens=4).tpot_ms is None


def test_goodput_counts_requests_that_keep_every_limit():
    """Goodput counts only requests that meet every limit."""
    found = [
        record(0),
        record(1, ttft_ms=300),
        record(2, gap_ms=90),
        record(3, error="timeout"),
        record(4, tokens=1),
    ]
    rules = Rules({"ttft": 200.0, "tpot": 50.0})
    figures = measures.figures(found, Window(0, 2), rules)
    assert figures["goodput"]["share"] == pytest.approx(2 / 5)
    assert figures["goodput"]["requests_per_s"] == pytest.approx(1.0)
    assert not measures.kept_slos(record(tokens=0), {"ttft": 200.0}), "no token came"
    assert not measures.kept_slos(record(gap_ms=90), {"gap": 80}) and measures.kept_slos(
        record(), {"jct": 140.1}
    )


def test_rates_are_of_the_window():
    """Rates count only what happened within the window."""
    found = [record(sent_s=0.0, ttft_ms=500, gap_ms=1000, tokens=4)]  # at 0.5, 1.5, 2.5 and 3.5 s
    rates = measures.throughput(found, Window(1.0, 3.0))
    assert rates["output_tokens_per_s"] == pytest.approx(1.0)
    assert rates["requests_per_s"] == rates["prompt_tokens_per_s"] == 0
    rates = measures.throughput(found, Window(0.0, 4.0))
    assert (rates["prompt_tokens_per_s"], rates["computed_prompt_tokens_per_s"]) == (25, 15)


def test_shares_and_stalls_leave_out_what_was_not_reported():
    """Requests without reported cached tokens do not count in the cached share; a hanging request counts as stalled."""
    assert measures.cached_share([record(), record(cached_tokens=None)]) == pytest.approx(0.4)
    assert measures.cached_share([record(cached_tokens=None)]) is None
    hanging = attrs.evolve(record(), end_s=9.0, error="timeout")
    assert measures.stalled(hanging, 5.0) and not measures.stalled(record(), 5.0)


def test_the_answers_of_another_run_are_matched_by_prompt():
    """Answers of two runs are compared only where their prompts were the same."""
    ours = [record(i, prompt_digest="p", answer_digest="a", answer="same") for i in range(4)]
    theirs = [
        record(0, prompt_digest="p", answer_digest="b", answer="same"),
        record(1, prompt_digest="p", answer_digest="b", answer="sane"),
        record(2, prompt_digest="q", answer_digest="b"),
        record(3, error="timeout"),
    ]
    found = measures.against(ours, theirs)
    assert [found[name] for name in ("same", "different", "other_prompt", "missing")] == [1, 1, 1, 1]
    assert found["examples"] == [{"session": "1", "turn": 0, "at": 2}]


# ---- comparisons ---------------------------------------------------------------------------------------------


def noisy(seed: int, slower: float = 1.0, count: int = 300) -> list[Record]:
    """Requests whose sessions are slow or fast alike in every run, each run with its own noise."""
    rng, own = np.random.default_rng(99), np.random.default_rng(seed)
    bases = rng.lognormal(5, 0.8, count)
    return [
        record(i, sent_s=i / 10, ttft_ms=float(base * slower * own.normal(1, 0.02)), gap_ms=10 * slower)
        for i, base in enumerate(bases)
    ]


def row(rows: list[compare.Row], name: str) -> compare.Row:
    """The row with this name."""
    return next(one for one in rows if one.name == name)


def test_a_true_ratio_lies_in_its_interval_and_noise_does_not_differ():
    """A real difference lies within its confidence interval, and noise gives no difference."""
    base = run(noisy(1))
    faster = compare.compare([base, run(noisy(2, 0.9), "b")], 400)
    for name in ("time to first token mean", "time to first token p50", "job completion time p90"):
        (ratio,) = row(faster, name).ratios
        assert ratio.low < 0.9 < ratio.high and ratio.differs, name
        # Sessions differ by a factor of five and more; pairing takes that out.
        assert ratio.high - ratio.low < 0.2
    (ratio,) = row(compare.compare([base, run(noisy(3), "b")], 400), "time to first token mean").ratios
    assert ratio.ratio == pytest.approx(1, abs=0.02)


def test_an_interval_covers_as_often_as_it_says():
    """A 95 % interval of equal runs contains 1 about as often as it should."""
    covered = 0
    for seed in range(40):
        rows = compare.compare([run(noisy(seed, count=60)), run(noisy(seed + 1000, count=60), "b")], 200)
        (ratio,) = row(rows, "time to first token mean").ratios
        covered += not ratio.differs
    assert covered >= 34


def test_comparisons_are_repeatable_and_have_all_runs():
    """Comparing the same runs gives the same intervals, and every run has its column."""
    runs = [run(noisy(1)), run(noisy(2), "b"), run(noisy(3), "c")]
    rows = compare.compare(runs, 100)
    assert rows == compare.compare(runs, 100)
    assert all(len(one.values) == 3 and len(one.ratios) == 2 for one in rows)
    assert row(rows, "cached share").values == pytest.approx((0.4, 0.4, 0.4))
    assert row(rows, "output tokens").ratios[0].low < 1 < row(rows, "output tokens").ratios[0].high


def test_different_workloads_are_not_compared():
    """Runs of different workloads or arrivals are not compared."""
    with pytest.raises(LoadgenError, match="They differ in arrivals: closed and poisson"):
        compare.compare([run(noisy(1)), run(noisy(2), "b", arrivals="poisson")])
    with pytest.raises(LoadgenError, match="two runs or more"):
        compare.compare([run(noisy(1))])


def test_runs_without_answers_are_compared_by_what_they_have():
    """A run without any answer is compared by its counts only."""
    dead = run([attrs.evolve(one, error="timeout", event_ms=[]) for one in noisy(2)], "b")
    rows = compare.compare([run(noisy(1)), dead], 50)
    assert row(rows, "requests answered").values == (1.0, 0.0)
    assert not [one for one in rows if one.unit == "ms"]


def test_runs_in_which_nothing_was_measured_can_be_compared():
    """If it failed, a warm-up longer than both runs would be a traceback."""
    nothing = run(noisy(1))
    nothing.summary["window"] = {"start_s": 1e6, "end_s": 1e6}
    rows = compare.compare([nothing, nothing], 100)
    assert {one.values for one in rows} == {(None, None), (0.0, 0.0)}
    assert {one.ratios for one in rows} == {(None,)}


# ---- reports -------------------------------------------------------------------------------------------------


def test_reports_are_whole_pages_that_need_nothing_else():
    """Reports are single HTML pages without scripts or links, and escape text from servers."""
    found = [*noisy(1, count=40), record(40, error="<script>", detail="<script>alert(1)</script>")]
    one, other = run(found, "a"), run(noisy(2, count=40), "b")
    one.summary["tenants"] = {"t": one.summary["figures"]}
    one.summary["reference"] = measures.against(found, found) | {"run": "r"}
    pages = [
        report.of_run(one),
        report.of_sweep([("s", [one, other])], "rate"),
        report.of_comparison([one, other], compare.compare([one, other], 50)),
    ]
    for page in pages:
        assert page.count("<svg") >= 5 and "<script" not in page
        assert "mind &lt;this&gt;" in page
        assert not [part for part in ("<link", "src=", "@import") if part in page]


def test_the_timeline_adds_up():
    """The plotted load over time adds up to the requests and tokens of the run."""
    found = [
        record(0, sent_s=0.0, ttft_ms=1000, gap_ms=1000, tokens=4),
        record(1, sent_s=2.0, ttft_ms=2000, tokens=1),
    ]
    edges, series = plots.load_over_time(run(found))
    width = edges[1] - edges[0]
    assert series["in flight"].sum() * width == pytest.approx(sum(one.jct_ms for one in found) / 1e3)
    assert series["tokens"].sum() * width == pytest.approx(5)
    assert (series["prompt"].sum(), series["cached"].sum()) == (200, 80)


def test_records_of_another_kind_are_explained(tmp_path):
    """Files that are missing or are no records give a clear error."""
    path = tmp_path / "requests.jsonl"
    with pytest.raises(LoadgenError, match="cannot be read"):
        records.read(path)
    path.write_text("{}\n")
    with pytest.raises(LoadgenError, match="line 1 lacks asked_tokens, due_s"):
        records.read(path)
    path.write_text("no\n")
    with pytest.raises(LoadgenError, match="line 1 is not JSON"):
        records.read(path)
