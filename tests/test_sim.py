"""The simulator: hundreds of seeded runs in which everything goes wrong, and proof that it would notice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from memserve.engine.paging import Paging
from memserve.mempool.shard import ShardCore
from memserve.scheduling.index_feed import IndexFeed
from memserve.sim.faults import KINDS, parse
from memserve.sim.fuzz import fuzz

ROOT = Path(__file__).parents[1]
GROUPS = [(f"{kind}:{start}", (kind,), range(start, start + 10)) for kind in KINDS for start in (0,)]
GROUPS += [(f"all:{start}", KINDS, range(start, start + 20)) for start in range(0, 160, 20)]


@pytest.mark.parametrize(("kinds", "seeds"), [one[1:] for one in GROUPS], ids=[one[0] for one in GROUPS])
def test_whatever_goes_wrong_nothing_is_lost(kinds, seeds) -> None:
    """Each request ends once with the right tokens, no page has two writers, all comes to rest: else the seed is printed."""
    bad = [(one.seed, one.violation) for one in (fuzz(seed, kinds) for seed in seeds) if one.violation]
    assert not bad, f"memserve sim --faults {','.join(kinds)} --seed {bad[0][0]}: {bad[0][1]}"


@pytest.mark.parametrize(
    ("kinds", "seed", "harm"),
    [
        (
            "pause",
            39,
            "a shard that was held for dead while it slept was never told to leave, and no worker could join it",
        ),
        (
            "pause",
            34,
            "a Frontend that was held for dead while it slept went on without a view, its requests dropped",
        ),
        ("pause", 24, "a scheduler span when a member's silence ended between two floats"),
        ("partition", 0, "a worker that missed the one view that named its shard waited for ever"),
        ("loss", 1, "an AllocMem that was lost was never repeated, and its stream stood still"),
        ("loss", 4, "a Prefill or a last Tokens that was lost was missed by nobody"),
        ("loss", 10, "an Acquire that was lost was never repeated"),
        (
            "duplication",
            0,
            "a delta that came twice asked for a snapshot, and nobody asked again when that was lost",
        ),
        (
            "all",
            258,
            "a shard that died together with the scheduler was mourned by nobody, and its workers stayed with it",
        ),
        ("all", 65, "a withdrawal that was lost, and crossed the answer, left a lease that nobody knew of"),
    ],
)
def test_what_the_simulator_found_stays_mended(kinds, seed, harm) -> None:
    """These seeds failed once, for the reason given."""
    assert fuzz(seed, parse(kinds)).violation == "", harm


def caught(kinds: str, seeds: range) -> list[str]:
    """What the runs complain about."""
    return [one.violation for one in (fuzz(seed, parse(kinds)) for seed in seeds) if one.violation]


def test_a_lost_release_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were not, a worker that forgets to give pages back would empty the pool unseen."""
    monkeypatch.setattr(Paging, "release", Paging.forget)
    assert any("leases" in one for one in caught("none", range(6)))


def test_a_missing_fence_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were not, a worker that wakes up would write to pages that are another's by now."""
    monkeypatch.setattr(ShardCore, "_fence", lambda self, owner: None)
    assert any("is written by" in one or "writes to pages" in one for one in caught("pause", range(20)))


def test_a_skipped_snapshot_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were not, a scheduler would route by an index that it does not know."""
    monkeypatch.setattr(IndexFeed, "snapshot", lambda self, sender, part, now: [])
    assert any("does not know the index" in one for one in caught("loss", range(20)))


def test_one_seed_is_one_run() -> None:
    """Byte for byte, whatever order sets of this process have: else a seed that failed could not be looked at."""
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
