"""``memserve up`` with a step engine that answers at once with fixed tokens: the control plane alone.

The same processes, sockets and cores; no model is run. ``bench/frontend.py`` starts it::

    python bench/null_cluster.py up --step-ms 0 -- model.path=... frontend.port=0
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import attrs

from memserve import config
from memserve.actors import worker
from memserve.child import Launch
from memserve.engine.plans import BatchPlan, BatchResult, StepEngine
from memserve.place import Place
from memserve.process import run_actor
from memserve.supervisor import Supervisor, supervise

TOKENS = range(1000, 1064)
"""Ordinary words of the demo model's vocabulary."""


@attrs.define
class NullEngine:
    """The token at position p is ``TOKENS[p % len(TOKENS)]``. A step takes ``step_s``, most of it asleep."""

    step_s: float = 0.0
    _next: float = attrs.field(default=0.0, init=False)

    def run(self, plan: BatchPlan) -> BatchResult:
        """A full step without arithmetic. Steps that follow one another keep the pace, whatever came between."""
        now = time.monotonic()
        self._next = max(self._next + self.step_s, now)
        if self._next > now:
            time.sleep(self._next - now)
        tokens = [None if row.sample is None else TOKENS[row.end % len(TOKENS)] for row in plan.rows]
        return BatchResult(tuple(tokens), (time.monotonic() - now) * 1e3, 1)

    def rest(self) -> None:
        """Holds no cores."""

    def close(self) -> None:
        """Holds nothing."""


def start_null_engine(step_s: float, *_given: object) -> StepEngine:
    """What :func:`memserve.actors.worker.start_engine` is replaced by."""
    return NullEngine(step_s)


def actor_argv(step_ms: float, name: str, runtime_dir: Path, lifeline_fd: int) -> Sequence[str]:
    """The command line of an actor with this engine."""
    command = [sys.executable, __file__, "actor", name, "--runtime-dir", str(runtime_dir)]
    return [*command, "--lifeline", str(lifeline_fd), "--step-ms", str(step_ms)]


def up(step_ms: float, settings: Sequence[str]) -> None:
    """Run the demo's cluster with this engine, and other settings, until it is stopped."""
    chosen = config.load("demo", settings)
    place = Place.claim(Path(chosen.logging.dir))
    try:
        supervise(Supervisor(config.resolve(chosen), Launch(place, argv=partial(actor_argv, step_ms))))
    finally:
        place.leave()


def be_actor(step_ms: float, name: str, runtime_dir: str, lifeline: int) -> int:
    """Be one actor; the exit status."""
    worker.start_engine = partial(start_null_engine, step_ms / 1e3)
    worker.import_engine = lambda on_gpu: None  # torch is not needed here
    return run_actor(name, runtime_dir, lifeline)


def main() -> int:
    """Be the cluster or one of its actors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cluster, actor = commands.add_parser("up"), commands.add_parser("actor")
    for one in (cluster, actor):
        one.add_argument("--step-ms", type=float, required=True)
    cluster.add_argument("settings", nargs="*", help="key=value")
    actor.add_argument("name")
    actor.add_argument("--runtime-dir", required=True)
    actor.add_argument("--lifeline", type=int, required=True)
    options = parser.parse_args()
    if options.command == "actor":
        return be_actor(options.step_ms, options.name, options.runtime_dir, options.lifeline)
    up(options.step_ms, options.settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
