"""The simulator: hundreds of seeded runs with every kind of fault, and tests that it would notice a violation."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from memserve import cli
from memserve.commands.sim_options import SimOptions
from memserve.commands.simulate import costs_of, runs_of
from memserve.costs import Site, StepCosts
from memserve.engine.paging import Paging
from memserve.errors import UserError
from memserve.mempool.exchange import Exchange
from memserve.mempool.shard import ShardCore
from memserve.scheduling.index_feed import IndexFeed
from memserve.sim.faults import KINDS, parse
from memserve.sim.fuzz import fuzz
from memserve.sim.layout import fixed, on_sites
from memserve.sim.network import Network
from memserve.sim.report import Report
from memserve.sim.run import Run, simulate
from memserve.sim.sites import Sites
from memserve.sim.workloads import generated, one_pool_bound, read_trace
from memserve.sim.world import World
from memserve.transfer.incoming import Incoming

ROOT = Path(__file__).parents[1]
GROUPS = [(f"{kind}:0", (kind,), range(5)) for kind in KINDS]
GROUPS += [(f"all:{start}", KINDS, range(start, start + 20)) for start in range(0, 160, 20)]


@pytest.mark.parametrize(("kinds", "seeds"), [one[1:] for one in GROUPS], ids=[one[0] for one in GROUPS])
def test_whatever_goes_wrong_nothing_is_lost(kinds, seeds) -> None:
    """Under any faults each request ends once with the right tokens, no page has two writers, and all comes to rest."""
    bad = [(one.seed, one.violation) for one in (fuzz(seed, kinds) for seed in seeds) if one.violation]
    assert not bad, f"memserve sim --faults {','.join(kinds)} --runs 1 --seed {bad[0][0]}: {bad[0][1]}"


@pytest.mark.parametrize(
    ("kinds", "seed", "harm"),
    [
        (
            "pause",
            39,
            "a shard that was declared dead while it was paused never learned of it, and no worker could join it",
        ),
        (
            "pause",
            34,
            "a Frontend that was declared dead while it was paused went on without a view, its requests dropped",
        ),
        ("partition", 14, "a scheduler looped for ever when a member's silence ended between two floats"),
        ("partition", 0, "a worker that missed the one view that named its shard waited for ever"),
        (
            "all",
            230,
            "a decode worker with another lease of an attempt answered that it had taken this one too: it leaked",
        ),
        ("loss", 1, "an AllocMem that was lost was never repeated, and its stream stopped"),
        ("loss", 4, "nobody noticed that a Prefill or the last Tokens was lost"),
        ("loss", 10, "an Acquire that was lost was never repeated"),
        (
            "duplication",
            0,
            "a delta that came twice asked for a snapshot, and nobody asked again when that was lost",
        ),
        (
            "all",
            258,
            "a shard that died together with the scheduler was never announced dead, and its workers stayed with it",
        ),
        (
            "all",
            1118,
            "a decode worker that died together with the scheduler was never announced dead, and was offered a request for ever",
        ),
    ],
)
def test_what_the_simulator_found_stays_fixed(kinds, seed, harm) -> None:
    """Seeds that failed once, for the reason given, do not fail again."""
    found = fuzz(seed, tuple(one for one in parse(kinds) if one != "tear"), across=False)
    assert found.violation == "", harm


def caught(kinds: str, seeds: range) -> list[str]:
    """The violations that the runs with these seeds report."""
    return [one.violation for one in (fuzz(seed, parse(kinds)) for seed in seeds) if one.violation]


def test_a_lost_release_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator notices workers that do not give their pages back."""
    monkeypatch.setattr(Paging, "release", Paging.forget)
    assert any("leases" in one for one in caught("none", range(6)))


def test_a_missing_fence_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator notices a worker that wakes up and writes to pages which belong to another."""
    monkeypatch.setattr(ShardCore, "_fence", lambda self, owner: None)
    assert any("is written by" in one or "writes to pages" in one for one in caught("pause", range(20)))


def test_a_page_that_is_still_written_to_from_afar_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator notices a receiver that gives pages away while a slow sender still writes to them."""
    monkeypatch.setattr(Incoming, "_ask_to_stop", lambda self, key, one, now: self._release(key))
    assert any("no transfer holds" in one or "at once" in one for one in caught("pause", range(40)))


def test_a_page_shown_before_it_is_there_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator notices pages that are served although their transfer broke off."""
    monkeypatch.setattr(Exchange, "release", Exchange.commit)
    assert any("hold other tokens" in one or "an undisturbed run" in one for one in caught("tear", range(20)))


def test_a_skipped_snapshot_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator notices a scheduler that ignores an index snapshot."""
    monkeypatch.setattr(IndexFeed, "snapshot", lambda self, sender, part, now: [])
    assert any("does not know the index" in one for one in caught("loss", range(20)))


def test_one_seed_is_one_run() -> None:
    """A seed gives the same run byte for byte, whatever the hash seed: a failing seed must be reproducible."""
    code = "from memserve.sim.fuzz import fuzz; print([fuzz(seed) for seed in (3, 5)])"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": salt, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(found) == 1 and "digest" in found.pop()


# ---- traces --------------------------------------------------------------------------------------------------


def made_up_trace(lines: int) -> list[dict]:
    """Requests whose hash ids chain as in Mooncake's traces: an id stands for a block and all blocks before it."""
    rng = random.Random(7)
    ids: dict[tuple[int, ...], int] = {}
    rows = []
    for i in range(lines):
        blocks = [0, *(rng.randrange(2) for _ in range(rng.randrange(6)))]
        last = rng.choice((512, 512, rng.randrange(1, 512)))
        chain = [tuple(blocks[:end]) for end in range(1, len(blocks) + 1)]
        if last < 512:
            chain[-1] = (*chain[-1], 1000 + i)
        found = [ids.setdefault(one, len(ids)) for one in chain]
        length = (len(found) - 1) * 512 + last
        rows.append({"timestamp": 50 * i, "input_length": length, "output_length": 96, "hash_ids": found})
    return rows


def reused_blocks(rows: list[dict]) -> int:
    """The number of full blocks at the start of prompts that came before, by the ids alone; a last token is always
    computed."""
    seen: set[int] = set()
    hits = 0
    for row in rows:
        full = row["hash_ids"][: row["input_length"] // 512]
        usable = full[:-1] if row["input_length"] % 512 == 0 else full
        for one in usable:
            if one not in seen:
                break
            hits += 1
        seen.update(full)
    return hits


@pytest.mark.parametrize("layout", ["colocated", "1P1D"])
def test_a_trace_finds_exactly_what_its_ids_say(tmp_path: Path, layout: str) -> None:
    """A replayed trace has as many cached tokens as its hash ids promise."""
    rows = made_up_trace(80)
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    sessions = tuple(read_trace(path, block_tokens=16))
    found = simulate(
        Run(layout=fixed(layout, 2, pages=4000, shared=True, caching="1"), sessions=sessions, serial=True)
    )
    assert reused_blocks(rows) > 100
    assert found.cached_tokens == 16 * reused_blocks(rows)
    assert found.outcomes == {"length": 80}
    assert one_pool_bound(sessions, 16) == (16 * reused_blocks(rows), found.prompt_tokens)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            '{"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [1]}',
            "1 hash_ids for input_length 600",
        ),
        ('{"timestamp": 0, "output_length": 3, "hash_ids": [1]}', "lacks 'input_length'"),
        ("timestamp,input", "expected an object with timestamp"),
        ('{"timestamp": 0, "input_length": -5, "output_length": 3}', "input_length -5 and output_length 3"),
        ('{"timestamp": NaN, "input_length": 5, "output_length": 3}', "timestamp nan"),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    """A wrong line of a trace file is reported with its number and what was expected."""
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match="line 1") as caught_error:
        read_trace(path, block_tokens=16)
    assert complaint in str(caught_error.value)


def test_a_damaged_gzip_file_is_one_clear_error(tmp_path: Path) -> None:
    """A download that broke off would be a traceback."""
    whole = gzip.compress("\n".join(json.dumps(row) for row in made_up_trace(50)).encode())
    path = tmp_path / "trace.jsonl.gz"
    for data in (whole[:-20], whole[:40] + b"damaged" + whole[47:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match="cannot be read"):
            read_trace(path, block_tokens=16)


def test_a_trace_begins_with_its_first_request(tmp_path: Path) -> None:
    """A part of a trace, or one with the time of day, would be simulated from 1970 on and never end."""
    rows = [{**row, "timestamp": row["timestamp"] + 1_700_000_000_000} for row in made_up_trace(3)]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows[::-1]))
    assert [one.at_s for one in read_trace(path, block_tokens=16, speed=0.5)] == pytest.approx(
        [0.2, 0.1, 0.0], abs=1e-6
    )


def test_workers_are_busy_while_there_are_requests() -> None:
    """Counted over the cluster's start and end too, a worker that is never idle would seem half idle."""
    run = Run(
        layout=fixed("colocated", 1, pages=4000),
        sessions=tuple(generated("loogle", rate=100.0, requests=40, seed=1)),
    )
    assert 0.8 < simulate(run).workers[0].busy <= 1.0


# ---- the command ---------------------------------------------------------------------------------------------


def sim(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run `memserve sim`; returns its exit status and output."""
    status = cli.run(["sim", *words])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_a_run_with_faults_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """The command runs a real configuration with faults and reports it; the same arguments give the same bytes."""
    words = (
        "--workload",
        "react",
        "--rate",
        "8",
        "--requests",
        "12",
        "--faults",
        "crash,pause",
        "--checked",
        "--pages",
        "3000",
    )
    status, said = sim("-c", str(ROOT / "configs/2p2d.toml"), *words, "--seed", "4", capsys=capsys)
    assert status == 0, said
    assert "TTFT" in said and "event log" in said
    assert sim("-c", str(ROOT / "configs/2p2d.toml"), *words, "--seed", "4", capsys=capsys) == (0, said)


def test_layouts_and_policies_are_compared_by_an_slo(capsys: pytest.CaptureFixture[str]) -> None:
    """One table compares layouts and policies and says which of them meet the SLO."""
    configs = [str(ROOT / "configs" / name) for name in ("colocated.toml", "2p2d.toml")]
    words = ("--workload", "loogle", "--rate", "40", "--requests", "60", "--pages", "4000", "--json")
    status, said = sim(
        "-c", configs[0], "-c", configs[1], "--policy", "round_robin,least_load", "--slo", "ttft=0.2,tpot=0.05", *words,
        capsys=capsys,
    )  # fmt: skip
    assert status == 0, said
    found = [json.loads(line) for line in said.splitlines()]
    assert [(one["layout"], one["policy"]) for one in found] == [
        (layout, policy) for layout in ("colocated", "2p2d") for policy in ("round_robin", "least_load")
    ]
    assert {one["meets_slo"] for one in found} == {True, False}
    for one in found:
        within = one["ttft_s"]["p99"] <= 0.2 and one["tpot_s"]["p99"] <= 0.05
        assert one["meets_slo"] == within


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--workload", "poetry"), "must be one of sharegpt, loogle, react, shifting"),
        ((), "give either --trace FILE or --workload"),
        (("--workload", "react", "--faults", "flood"), "--faults must be all, none or of"),
        (("--workload", "react", "--slo", "speed=1"), "--slo must use the names ttft, tpot, jct"),
        (("--workload", "react", "--sites", "-1"), "--sites must be at least 1"),
        (("--workload", "react", "--pages", "-5"), "--pages must be at least 1"),
        (("--workload", "react", "--rate", "nan"), "--rate must be above 0, and finite, not nan"),
        (("--trace", "/nowhere.jsonl", "--scale", "nan"), "--scale must be above 0"),
        (("--trace", "/nowhere.jsonl", "--speed", "-1"), "--speed must be above 0"),
        (("--workload", "react", "--error", "-3"), "--error must be a share from 0 to below 1"),
        (("--workload", "react", "--requests", "0"), "--requests must be at least 1, not 0"),
        (("--trace", "/nowhere.jsonl", "--requests", "-1"), "--requests must be at least 1, not -1"),
        (("--runs", "0"), "--runs must be at least 1, not 0"),
        (("--workload", "react", "--pages", "0"), "--pages must be at least 1, not 0"),
        (("--trace", "/nowhere.jsonl", "--scale", "0.0001"), "--scale must leave a block of 512"),
        (("--trace", "/nowhere.jsonl", "--speed", "nan"), "--speed must be above 0, and finite, not nan"),
        (("--trace", "/nowhere.jsonl"), "cannot be read"),
        (("--workload", "react", "--costs", "/nowhere.toml"), "--costs /nowhere.toml"),
    ],
)
def test_what_cannot_be_simulated_is_explained(words, complaint, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong arguments give one line that names the option, and no traceback."""
    status, said = sim(*words, capsys=capsys)
    assert status == cli.STATUS_USER_ERROR
    assert complaint in said and "Traceback" not in said


def test_workers_of_one_site_crowd_one_another_and_cost_knows_it() -> None:
    """Workers on one host slow each other down, and the ``cost`` policy therefore keeps streams together."""
    costs = costs_of(ROOT / "configs/costs/135m-two-cores.toml")
    sessions = tuple(generated("sharegpt", rate=1.5, requests=40, seed=3))

    def run(policy: str, sites: int) -> Report:
        layout = fixed("colocated", 2, pages=4000, shared=True, policy=policy)
        return simulate(Run(layout=on_sites(layout, sites), sessions=sessions, costs=costs, seed=3))

    spread, separate = run("least_load", 1), run("least_load", 0)
    assert spread.jct_s.mean > 1.3 * separate.jct_s.mean
    assert run("least_load", 2).digest != "" and run("least_load", 2).jct_s == separate.jct_s
    together = run("cost", 1)
    assert together.jct_s.mean < 0.85 * spread.jct_s.mean
    assert max(one.decode_tokens for one in together.workers) > 0.8 * sum(
        one.decode_tokens for one in together.workers
    )


def test_steps_wait_for_cores_of_a_host_and_not_for_a_gpu() -> None:
    """What `--sites` simulates is what docs/simulator.md says: on a host, a step waits while another has all cores."""

    def sites(config: str) -> list[Site | None]:
        asked = SimOptions(
            config=(str(ROOT / "configs" / config),), sites=1, pages=100, workload="react", requests=1
        )
        (run,) = runs_of(asked)
        return [one.site for one in run.layout.workers]

    host, gpu = sites("2p2d.toml"), sites("one-gpu.toml")
    assert len({one.key for one in host}) == len({one.key for one in gpu}) == 1
    assert all(one.threads == one.cores > 1 for one in host)
    assert all(one.threads == one.cores == 1 for one in gpu)


def test_a_step_is_crowded_for_as_long_as_its_neighbour_is_in_one() -> None:
    """A step is slowed down exactly while its neighbour runs one, and a decode step waits for its share of the cores."""
    costs = StepCosts(((1, 0.1),), decode_crowding=0.5, prefill_crowding=1.0)
    world, site, ends = World(Network(random.Random(0))), Site("one", 2, 2), []
    sites = Sites(world, costs)

    def begin(name: str, seconds: float, prompts: bool, where: Site | None = site) -> None:
        def done(took: float, shared: float, waited: float) -> None:
            ends.append((name, *(round(one, 9) for one in (world.now, took, shared, waited))))

        sites.begin(where, name, seconds, prompts, done)

    world.at(0.0, begin, "prompt", 1.0, True)
    world.at(0.2, begin, "stream", 0.2, False)
    world.at(1.01, begin, "stream", 0.1, False)
    world.run(10.0)
    # The stream waits until 0.7 and takes 1.5 times as long; in these 0.3 s the prompt runs at half its speed. The stream's
    # next step follows at once, and gets its share at once.
    assert ends == [
        ("stream", 1.0, 0.3, 1.0, 0.5),
        ("stream", 1.16, 0.15, 1.0, 0.0),
        ("prompt", 1.225, 1.225, 0.225, 0.0),
    ]
    ends.clear()
    world.at(2.0, begin, "prompt", 0.2, True)
    world.at(2.1, begin, "stream", 0.1, False)
    world.at(2.1, begin, "apart", 1.0, True, None)
    world.run(10.0)
    assert ends == [
        ("prompt", 2.2, 0.2, 0.0, 0.0),
        ("stream", 2.3, 0.1, 0.0, 0.1),
        ("apart", 3.1, 1.0, 0.0, 0.0),
    ], "it waits for the end"


def test_the_search_names_the_seed_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search that finds a failing seed ends with an error and prints the command that repeats it."""
    assert sim("--faults", "all", "--runs", "3", capsys=capsys)[0] == 0
    for harm in (Paging.forget, lambda *_: None.gone):
        monkeypatch.setattr(Paging, "release", harm)
        status, said = sim("--faults", "none", "--runs", "2", capsys=capsys)
        assert status == 1
        assert "memserve sim --faults none --runs 1 --seed 0: " in said


def test_the_guide_shows_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output in docs/simulator.md is what its command prints."""
    monkeypatch.chdir(ROOT)
    guide = (ROOT / "docs/simulator.md").read_text()
    command = next(line for line in guide.replace("\\\n", " ").splitlines() if "--slo ttft=0.2" in line)
    status, said = sim(*command.split()[2:], capsys=capsys)
    shown = guide.split("```\n")[1]
    assert status == 0 and [line.split() for line in said.splitlines()] == [
        line.split() for line in shown.splitlines()
    ]


def test_every_kind_of_fault_is_documented() -> None:
    """Every kind of fault is named in docs/operations.md and docs/simulator.md."""
    said = (ROOT / "docs/operations.md").read_text(), (ROOT / "docs/simulator.md").read_text()
    assert all(f"`{kind}`" in text for kind in KINDS for text in said)


def test_gpus_of_one_host_move_pages_in_the_simulator_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Simulated shards move pages over the ``cuda`` path as real ones do."""
    words = ("--workload", "sharegpt", "--requests", "10", "--pages", "4000", "--json")
    status, said = sim("-c", str(ROOT / "configs/two-gpus.toml"), *words, capsys=capsys)
    assert status == 0, said
    assert json.loads(said)["moved_bytes"] > 0
