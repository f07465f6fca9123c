"""The benchmarks on real clusters: what they send, what is predicted for it, and the notes that they write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import msgspec
import pytest

import cluster
import notes
import policies
import policies_note
import prediction
import serving
import serving_note
from loadgen import arrivals, build
from memserve.costs import Site, StepCosts
from memserve.scheduling.cost_model import CostModel
from memserve.settings.configfile import load

COSTS = CostModel(
    StepCosts(((1, 0.01), (512, 0.07)), row_s=1e-4, read_s=5e-7, pair_s=2e-8, token_bytes=23040)
)


@pytest.mark.parametrize("kind", serving.KINDS)
def test_the_simulator_plays_what_the_load_generator_plays(kind: Any) -> None:
    """The simulator plays the same sessions, times and lengths as the load generator."""
    options = serving.options_of_run(kind, 2.0, "http://127.0.0.1:1", "salt", serving.options_of([]))
    played, work = prediction.sessions_of(options), build.workload(kind, options.workload)
    assert 5 < len(played) < len(work.sessions)  # those that begin in time
    begin = arrivals.times(build.arrivals(options.arrivals, work, options.workload.seed), work.sessions)
    for ours, theirs, at in zip(played, work.sessions, begin, strict=False):
        assert (ours.id, ours.at_s, len(ours.turns)) == (theirs.id, at, len(theirs.turns))
        for turn, asked in zip(ours.turns, theirs.turns, strict=True):
            assert (turn.output, turn.wait_s, turn.fresh) == (asked.output_tokens, asked.think_s, asked.fresh)
            lengths = [
                [one.tokens for one in message.content] for message in asked.messages if message.content
            ]
            assert [one.tokens for one in turn.pieces] == [length for some in lengths for length in some]


def test_predictions_are_of_a_layout_and_of_reported_costs() -> None:
    """Predictions depend on caching and on whether workers share cores."""
    options = serving.options_of_run("react-like", 2.0, "http://127.0.0.1:1", "", serving.options_of([]))
    layouts = {one.name: one for one in serving.LAYOUTS}

    def said(name: str) -> dict[str, float]:
        layout = layouts[name]
        return prediction.predict(layout.path, layout.settings, 5000, COSTS, members, options)

    site = msgspec.to_builtins(Site("cores", 2, 2))
    members = [{"id": f"{name}.1", "site": site, "load": {}} for name in ("p0", "d0")]
    without, cached = said("colocated"), said("colocated-cc")
    assert without["cached_share"] == 0 and cached["cached_share"] > 0.5
    assert cached["TTFT mean"] < without["TTFT mean"]
    members = [{**one, "load": {"step_cost_scale": 1.2}} for one in members]
    assert said("colocated")["JCT mean"] > 1.05 * without["JCT mean"]
    members = []
    assert said("colocated")["JCT mean"] < without["JCT mean"]


def a_sample(layout: str, rate: float, ttft: float, **changed: Any) -> serving_note.Sample:
    """A sample of the sharegpt-like sessions."""
    values = {"TTFT mean": ttft, "requests": 9.0, "failed": 0.0, "cached_share": 0.5, "moved_mib": 1.0}
    made = serving_note.Sample(
        layout, "sharegpt-like", rate, values, False, {"TTFT mean": ttft / 2}, 12.0, 0.25, "abc"
    )
    return attrs.evolve(made, **changed)


def test_a_sweep_may_be_measured_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a sweep are merged without loss into one note; pieces with other settings are refused."""
    pieces = [
        [a_sample("colocated", 1.0, 100.0), a_sample("cost", 1.0, 50.0)],
        [a_sample("colocated", 3.0, 200.0), a_sample("cost", 3.0, 300.0), a_sample("cost", 3.0, 500.0)],
    ]
    paths = [tmp_path / f"{i}.json" for i in range(len(pieces))]
    for piece, path in zip(pieces, paths, strict=True):
        notes.save(piece, path)
    assert notes.merged(paths, serving_note.Sample, serving_note.SAME) == pieces[0] + pieces[1]
    monkeypatch.setattr(serving_note, "Note", lambda name: notes.Note(name, tmp_path, "2026-01-01", "abc"))
    text = serving_note.write_note(
        notes.merged(paths, serving_note.Sample, serving_note.SAME), serving.LAYOUTS, "x"
    ).read_text()
    assert "| cost | 50.0 (0.50) |" in text
    assert "| cost | 400 (2.00) |" in text
    assert "1 to 2 interleaved rounds of 12 s" in text
    assert (tmp_path / "2026-01-01-serving-sharegpt-like.svg").is_file()
    notes.save([a_sample("cost", 1.0, 1.0, seconds=30.0)], paths[0])
    with pytest.raises(ValueError, match="seconds 12, 30"):
        notes.merged(paths, serving_note.Sample, serving_note.SAME)


def test_policies_are_asked_what_the_simulator_plays() -> None:
    """The policies benchmark sends the sessions, times and documents that the simulator plays."""
    given = policies.options_of(["--sessions", "12"])
    ours = policies.sessions_of(3, 1, given)
    theirs = [policies.asked(one) for one in ours]
    assert len({one.turns[0].pieces[0].key for one in ours}) == 4
    assert ours[0].turns[0].pieces[0].tokens == 850
    for one, other in zip(ours, theirs, strict=True):
        assert (one.id, one.at_s, len(one.turns)) == (other.id, other.at_s, len(other.turns))
        for turn, asked in zip(one.turns, other.turns, strict=True):
            assert (turn.output, turn.wait_s) == (asked.output_tokens, asked.think_s)
            [message] = asked.messages
            assert [(piece.key, piece.tokens) for piece in turn.pieces] == [
                (piece.key, piece.tokens) for piece in message.content
            ]


def test_a_note_of_policies_says_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note of policies shows gains with the right sign, and with their spread over seeds."""
    values = {
        "TTFT p50": 10.0,
        "TTFT p99": 100.0,
        "JCT mean": 1.0,
        "cached": 0.5,
        "requests": 9.0,
        "failed": 0.0,
    }
    samples = [
        policies_note.Sample("session", 3, values, {"TTFT p50": 5.0}),
        policies_note.Sample("cost", 3, values | {"TTFT p99": 40.0, "TTFT p50": 11.0}, {}),
    ]
    monkeypatch.setattr(policies_note, "Note", lambda name: notes.Note(name, tmp_path, "2026-01-01", "abc"))
    text = policies_note.write_note(samples, "x").read_text()
    assert "| `cost` saves of P50; P99 | share ratio 3 |" in text
    assert "| session | -10%; 60% |" in text
    assert "four workers and the load generator on the same cores" in text
    assert "| session | 10.0 (0.50) | 100 | 1.00 | 50% | 1 | 0 |" in text
    samples.append(policies_note.Sample("session", 3, values | {"TTFT p50": 14.0}, {"TTFT p50": 9.0}, seed=2))
    text = policies_note.write_note(samples, "x").read_text()
    assert "| session | 12.0, 10.0 to 14.0 (0.58) | 100 | 1.00 | 50% | 2 | 0 |" in text
    assert "| session | -10%; 60% |" in text  # a seed that only one of both was run with says nothing
    samples.append(policies_note.Sample("cost", 3, values | {"TTFT p50": 7.0}, {}, seed=2))
    text = policies_note.write_note(samples, "x").read_text()
    assert "| session | 20% ± 30%; 30% ± 30% |" in text


@pytest.mark.parametrize(
    ("how", "name", "said"),
    [
        ({"cores": "p0=0.3,d0=0.7"}, "policies-apart", "by a control group (p0 0.3, d0 0.7)"),
        ({"costs": "configs/costs/x.toml"}, "policies-slept", "steps slept for what x.toml says"),
    ],
)
def test_a_note_of_policies_says_what_the_workers_ran_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, str], name: str, said: str
) -> None:
    """The note says if steps were only slept or cores were limited, and has another name then."""
    values = dict.fromkeys(("TTFT p50", "TTFT p99", "JCT mean", "cached", "requests", "failed"), 1.0)
    monkeypatch.setattr(policies_note, "Note", lambda name: notes.Note(name, tmp_path, "2026-01-01", "abc"))
    written = policies_note.write_note([policies_note.Sample("cost", 1, values, {}, **how)], "x")
    assert written.stem.endswith(name)
    assert said in written.read_text()


@pytest.mark.parametrize("scale", ["0.06", "0.5", "1"])
def test_pools_of_policies_are_as_short_as_the_prompts(scale: str) -> None:
    """Pools are scaled with the length of the prompts, so that they hold 8 to 14 documents."""
    words = policies.settings_of("cost", policies.options_of(["--scale", scale]))
    made = load(str(cluster.ROOT / "configs" / policies.CONFIG), words)
    document = 1700 * float(scale) * 23_040  # bytes
    assert 8 < made.shard[0].memory / document < 14


def test_samples_of_policies_are_read_back_as_they_were(tmp_path: Path) -> None:
    """Saved samples read back as they were; those with other settings are not merged."""
    samples = [
        policies_note.Sample("cost", 2, {"cached": 0.5}, {"TTFT p50": 5.0}, "abc", seed, scale=0.06)
        for seed in (1, 2)
    ]
    for one in samples:
        notes.save([one], tmp_path / str(one.seed))
    assert notes.merged([tmp_path / "1", tmp_path / "2"], policies_note.Sample, policies_note.SAME) == samples
    notes.save([attrs.evolve(samples[0], scale=0.5)], tmp_path / "1")
    with pytest.raises(ValueError, match=r"scale 0\.06, 0\.5"):
        notes.merged([tmp_path / "1", tmp_path / "2"], policies_note.Sample, policies_note.SAME)
    notes.save([attrs.evolve(samples[0], costs="x.toml")], tmp_path / "1")
    with pytest.raises(ValueError, match=r"costs None, x\.toml"):
        notes.merged([tmp_path / "1", tmp_path / "2"], policies_note.Sample, policies_note.SAME)


def test_a_cluster_that_does_not_start_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    """A benchmark whose cluster does not start shows the reason and ends without a traceback."""
    with pytest.raises(SystemExit, match=r"demo\.toml ended"), cluster.cluster("demo.toml", "batch.rows=0"):
        pass
    assert "batch.rows" in capfd.readouterr().err


def test_a_note_repeats_no_path_of_the_machine() -> None:
    """The command quoted in a note leaves out the paths given."""
    words = ["--rates", "3", "--json", "somewhere/x.json", "--json=x.json", "--seconds", "12"]
    assert notes.quoted(words) == ["--rates", "3", "--seconds", "12"]


def test_a_cluster_that_reports_no_costs_is_an_error() -> None:
    """A cluster whose workers report no costs raises an error instead of using others."""
    worker = {"costs": msgspec.to_builtins(COSTS.steps)}
    assert prediction.costs_of([{"costs": None}, worker]).steps == COSTS.steps
    with pytest.raises(ValueError, match="no worker"):
        prediction.costs_of([{"costs": None}])


def test_a_prediction_knows_whose_cores_the_clusters_workers_run_on() -> None:
    """A prediction uses the sites that the cluster's workers report."""
    worker = {"id": "p0.00000001", "site": msgspec.to_builtins(Site("host", 2, 2))}
    others = [{"id": "s0.00000001", "site": None}, {"id": "d0.00000001"}]
    assert prediction.sites_of([worker, *others]) == {"p0": Site("host", 2, 2)}
