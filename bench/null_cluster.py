"""The control plane alone: ``memserve up`` with a step engine that computes nothing and answers fixed tokens.

Processes, sockets, pages and cores are the real ones, but no model runs. A step sleeps for a fixed time
(``bench/frontend.py`` uses this) or for the time that a cost model predicts (``bench/policies.py``). In the
second case every worker is as fast as on a machine of its own, however many share this one::

    python bench/null_cluster.py up --step-ms 0 --set frontend.port=0
    python bench/null_cluster.py up --costs configs/costs/135m-two-cores.toml -c configs/3p1d.toml --set frontend.port=0
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import attrs

from memserve.actors import worker
from memserve.actors.worker import Found
from memserve.commands.simulate import costs_of
from memserve.engine.plans import BatchPlan, BatchResult, StepEngine
from memserve.processes.actor import modules_of, run_actor
from memserve.processes.lifecycle import roster
from memserve.processes.place import Place
from memserve.processes.zygote import Zygote, end, serve
from memserve.scheduling.cost_model import CostModel
from memserve.settings.configfile import load
from memserve.settings.resolve import resolve
from memserve.supervisor import Supervisor, supervise
from memserve.tokens import count

TOKENS = range(1000, 1064)
"""Ordinary words of the demo model's vocabulary."""


Pace = Callable[[BatchPlan, float, float], float]
"""End of a step in seconds, from its plan, its beginning and the end of the previous step."""


def steady(step_s: float) -> Pace:
    """End steps ``step_s`` apart, whatever happens between them; a step that begins later ends at once."""
    return lambda plan, begin, last: max(last + step_s, begin)


def predicted(costs: CostModel) -> Pace:
    """Let each step take the time that ``costs`` predicts."""
    return lambda plan, begin, last: begin + costs.step_s((count(row.tokens), row.start) for row in plan.rows)


@attrs.define
class NullEngine:
    """A step engine that sleeps. Its token at position p is ``TOKENS[p % len(TOKENS)]``."""

    pace: Pace = attrs.field(factory=partial(steady, 0.0))
    _last: float = attrs.field(default=0.0, init=False)

    def run(self, plan: BatchPlan) -> BatchResult:
        """Run a whole step without its arithmetic."""
        now = time.monotonic()
        self._last = self.pace(plan, now, self._last)
        if self._last > now:
            time.sleep(self._last - now)
        tokens = [None if row.sample is None else TOKENS[row.end % len(TOKENS)] for row in plan.rows]
        return BatchResult(tuple(tokens), (time.monotonic() - now) * 1e3, 1)

    def rest(self) -> None:
        """Do nothing: the engine occupies no cores."""

    def close(self) -> None:
        """Do nothing: the engine holds no resources."""


def start_null_engine(
    options: argparse.Namespace, context: object, shard: object, found: Found, *_: object
) -> StepEngine:
    """Replacement for :func:`memserve.actors.worker.start_engine`.

    With ``--costs``, the worker also reports these costs to the scheduler.
    """
    if options.costs is None:
        return NullEngine(steady(options.step_ms / 1e3))
    costs = costs_of(options.costs)
    found.costs = costs.steps
    return NullEngine(predicted(costs))


def zygote_argv(
    how: Sequence[str], runtime_dir: Path, modules: Sequence[str], orders_fd: int
) -> Sequence[str]:
    """The command line of a zygote of actors with this engine; ``how``: options for the duration of steps."""
    command = [sys.executable, __file__, "zygote", *modules]
    return [*command, "--runtime-dir", str(runtime_dir), "--orders", str(orders_fd), *how]


def up(options: argparse.Namespace) -> None:
    """Run a cluster with this engine until it is stopped."""
    chosen = load(options.config, options.set)
    given = {"--step-ms": options.step_ms, "--costs": options.costs}
    how = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    place = Place.claim(Path(chosen.logging.dir))
    try:
        resolved = resolve(chosen)
        zygote = Zygote(place, modules_of(roster(resolved), resolved), partial(zygote_argv, how))
        supervise(Supervisor(resolved, zygote))
    finally:
        place.leave()


def fork_actors(options: argparse.Namespace) -> NoReturn:
    """Be a zygote, and then each actor that it forks."""
    worker.start_engine = partial(start_null_engine, options)
    worker.import_engine = lambda on_gpu: None  # torch is not needed here
    name, lifeline = serve(options.runtime_dir, options.modules, options.orders)
    end(run_actor(name, options.runtime_dir, lifeline))


def main() -> int:
    """Run the cluster, or its zygote."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cluster, zygote = commands.add_parser("up"), commands.add_parser("zygote")
    for one in (cluster, zygote):
        how = one.add_mutually_exclusive_group(required=True)
        how.add_argument("--step-ms", type=float)
        how.add_argument("--costs", type=Path, help="TOML, as memserve sim takes it")
    cluster.add_argument("--config", "-c", default="demo")
    cluster.add_argument("--set", action="append", default=[])
    zygote.add_argument("modules", nargs="*")
    zygote.add_argument("--runtime-dir", required=True)
    zygote.add_argument("--orders", type=int, required=True)
    options = parser.parse_args()
    if options.command == "zygote":
        fork_actors(options)
    up(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
