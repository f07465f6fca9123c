"""``memserve up`` whose workers are as if each had a machine of its own, though they share one: a part of a core each.

Each worker's process is in a control group that may take so much CPU, runs steps of one thread, and has a budget of cores of
its own, as on another host. So one that is busy makes no other wait, which is what a scheduler's choice is about; how fast the
machine's cores are beside one another, it does not change. Nothing else is different: the same model, kernels, processes and sockets. Needs the right to make control groups (root has it), and cores for
all the parts and for what runs beside them. ``bench/policies.py`` starts it::

    python bench/apart_cluster.py up --cores p0=0.25,d0=0.7 -c configs/demo.toml --set frontend.port=0
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import attrs

from cpu_groups import cpu_groups, enter
from memserve.actors import worker
from memserve.costs import StepCosts
from memserve.processes import child
from memserve.processes.actor import run_actor
from memserve.processes.place import Place
from memserve.settings.configfile import load
from memserve.settings.resolve import resolve
from memserve.supervisor import Supervisor, prepare_argv, supervise


def actor_argv(
    groups: Mapping[str, Path], cores: Mapping[str, float], name: str, runtime_dir: Path, lifeline_fd: int
) -> Sequence[str]:
    """The command line of an actor: a worker is told its group."""
    if name not in groups:
        return child.actor_argv(name, runtime_dir, lifeline_fd)
    command = [sys.executable, __file__, "actor", name, "--runtime-dir", str(runtime_dir)]
    return [
        *command,
        "--lifeline",
        str(lifeline_fd),
        "--group",
        str(groups[name]),
        "--cores",
        str(cores[name]),
    ]


def parts(text: str) -> dict[str, float]:
    """Cores by worker, written ``p0=0.25,d0=0.7``. Raises ValueError."""
    found = (one.partition("=") for one in text.split(","))
    cores = {name: float(value) for name, _, value in found}
    if not all(one >= 0.1 for one in cores.values()):
        raise ValueError("a part must be at least 0.1, which is all that the kernel can count")
    return cores


def up(cores: Mapping[str, float], file: str, settings: Sequence[str]) -> None:
    """Run a cluster of CPU workers until it is stopped. Ends the program when a worker has no part."""
    chosen = load(file, settings)
    if (names := {one.name for one in chosen.worker}) != set(cores):
        sys.exit(f"--cores: must name each of {', '.join(sorted(names))} once, not {', '.join(cores)}")
    chosen = attrs.evolve(chosen, worker=tuple(attrs.evolve(one, threads=1) for one in chosen.worker))
    place = Place.claim(Path(chosen.logging.dir))
    try:
        resolved = resolve(chosen)
        with cpu_groups(cores) as groups:
            argv = partial(actor_argv, groups, cores)
            supervise(
                Supervisor(resolved, child.Launch(place, argv=argv), prepare_argv=prepare_argv(resolved))
            )
    finally:
        place.leave()


def be_worker(options: argparse.Namespace) -> int:
    """Be one worker, within its group once its steps have been measured; the exit status."""
    worker.CORES_FILE = f"cores-{options.name}.lock"
    worker.calibrate = partial(calibrate, worker.calibrate, options)
    return run_actor(options.name, options.runtime_dir, options.lifeline)


def calibrate(
    whole: Callable[..., StepCosts], options: argparse.Namespace, *told: object, **named: object
) -> StepCosts:
    """What its steps will cost: measured on a whole core, by ``whole``, which takes seconds, and not for each again."""
    engine, resolved, threads, kind, _ = told
    costs = whole(engine, resolved, threads, kind, lambda: None, **named)
    enter(options.group)
    return slower(costs, 1 / options.cores)


def slower(costs: StepCosts, times: float) -> StepCosts:
    """What the same steps cost where all takes so many times as long."""
    parts = {name: times * getattr(costs, name) for name in ("row_s", "read_s", "pair_s")}
    dense = tuple((tokens, times * seconds) for tokens, seconds in costs.dense)
    return attrs.evolve(costs, dense=dense, **parts)


def main() -> int:
    """Be the cluster or one of its workers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cluster, actor = commands.add_parser("up"), commands.add_parser("actor")
    cluster.add_argument("--cores", type=parts, required=True, help="by worker: p0=0.25,d0=0.7")
    actor.add_argument("--cores", type=float, required=True)
    cluster.add_argument("--config", "-c", required=True)
    cluster.add_argument("--set", action="append", default=[])
    actor.add_argument("name")
    actor.add_argument("--runtime-dir", required=True)
    actor.add_argument("--lifeline", type=int, required=True)
    actor.add_argument("--group", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "actor":
        return be_worker(options)
    up(options.cores, options.config, options.set)
    return 0


if __name__ == "__main__":
    sys.exit(main())
