"""Workers that run on separate parts of one machine's cores: bench/apart_cluster.py and its control groups."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from apart_cluster import parts, up
from cpu_groups import cpu_groups
from memserve.costs import StepCosts
from memserve.scheduling.cost_model import CostModel

BURN = """
import sys, time
from pathlib import Path
from cpu_groups import enter
enter(Path(sys.argv[1]))
began, used = time.monotonic(), time.process_time()
while time.monotonic() < began + 1.0:
    pass
print(time.process_time() - used)
"""


def test_a_group_takes_its_part_of_a_core_and_leaves_nothing_behind() -> None:
    """A process in a group gets its part of a core, and groups are removed afterwards."""
    try:
        with cpu_groups({"a": 0.7, "b": 0.2}) as groups:
            used = subprocess.run(
                [sys.executable, "-c", BURN, str(groups["b"])],
                cwd=Path(__file__).parent.parent / "bench",
                capture_output=True,
                text=True,
                check=True,
            ).stdout
    except OSError as error:
        pytest.skip(f"no control groups can be made here: {error}")
    assert float(used) < 0.4  # it had a second
    assert not any(one.exists() for one in groups.values())


def test_every_worker_must_have_its_part() -> None:
    """Parts must be given for every worker of the layout."""
    with pytest.raises(SystemExit, match="must name each of d0, p0, p1, p2 once, not p0, d0"):
        up(parts("p0=0.25,d0=0.7"), "3p1d", [])


def test_a_worker_on_a_part_of_a_core_takes_as_much_longer_for_every_step() -> None:
    """Costs for a part of a core are larger by the same factor for every kind of step."""
    costs = StepCosts(((1.0, 0.01), (256.0, 0.1)), row_s=1e-4, read_s=1e-6, pair_s=1e-7)
    whole, part = CostModel(costs), CostModel(costs.scaled(4.0))
    for tokens, cached in ((1, 0), (100, 1000), (2000, 500)):
        assert part.prefill_s(tokens, cached) == pytest.approx(4 * whole.prefill_s(tokens, cached))
    assert part.decode_s(8, 4000) == pytest.approx(4 * whole.decode_s(8, 4000))
