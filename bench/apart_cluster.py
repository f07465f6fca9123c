"""``memserve up`` with a part of a core for each worker, so that its workers do not delay one another.

Each worker's process is in a control group with a CPU limit, runs its steps on one thread, and has its own
core budget, as on another host. A busy worker therefore makes no other worker wait, which is what the
scheduler's choice of a worker depends on. The cores of the machine still affect one another's speed.
Everything else is the same: model, kernels, processes and sockets. Needs the right to make control groups
(root has it), and enough cores for all the parts and for the other processes. ``bench/policies.py`` starts
it::

    python bench/apart_cluster.py up --cores p0=0.25,d0=0.7 -c configs/demo.toml --set frontend.port=0
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import attrs

from cpu_groups import cpu_groups, enter
from memserve.actors import worker
from memserve.costs import StepCosts
from memserve.processes.actor import modules_of, run_actor
from memserve.processes.lifecycle import roster
from memserve.processes.place import Place
from memserve.processes.zygote import Zygote, end, serve
from memserve.settings.configfile import load
from memserve.settings.resolve import resolve
from memserve.supervisor import Supervisor, prepare_argv, supervise


def zygote_argv(
    groups: Mapping[str, Path],
    cores: Mapping[str, float],
    runtime_dir: Path,
    modules: Sequence[str],
    orders_fd: int,
) -> Sequence[str]:
    """The command line of a zygote that knows each worker's control group and its part of a core."""
    own = {name: [str(group), cores[name]] for name, group in groups.items()}
    command = [sys.executable, __file__, "zygote", json.dumps(own), *modules]
    return [*command, "--runtime-dir", str(runtime_dir), "--orders", str(orders_fd)]


def parts(text: str) -> dict[str, float]:
    """Parse cores by worker, written ``p0=0.25,d0=0.7``. Raises ValueError for a part below 0.1."""
    found = (one.partition("=") for one in text.split(","))
    cores = {name: float(value) for name, _, value in found}
    if not all(one >= 0.1 for one in cores.values()):
        raise ValueError("a part must be at least 0.1, which is all that the kernel can count")
    return cores


def up(cores: Mapping[str, float], file: str, settings: Sequence[str]) -> None:
    """Run a cluster of CPU workers until it is stopped.

    Ends the program unless ``cores`` names exactly the configured workers.
    """
    chosen = load(file, settings)
    if (names := {one.name for one in chosen.worker}) != set(cores):
        sys.exit(f"--cores: must name each of {', '.join(sorted(names))} once, not {', '.join(cores)}")
    chosen = attrs.evolve(chosen, worker=tuple(attrs.evolve(one, threads=1) for one in chosen.worker))
    place = Place.claim(Path(chosen.logging.dir))
    try:
        resolved = resolve(chosen)
        with cpu_groups(cores) as groups:
            zygote = Zygote(
                place, modules_of(roster(resolved), resolved), partial(zygote_argv, groups, cores)
            )
            supervise(Supervisor(resolved, zygote, prepare_argv=prepare_argv(resolved)))
    finally:
        place.leave()


def fork_actors(options: argparse.Namespace) -> NoReturn:
    """Be a zygote, and then each actor that it forks.

    A worker enters its control group once its steps are measured.
    """
    name, lifeline = serve(options.runtime_dir, options.modules, options.orders)
    if name in options.own:
        group, cores = options.own[name]
        worker.CORES_FILE = f"cores-{name}.lock"
        worker.calibrate = partial(calibrate, worker.calibrate, Path(group), cores)
    end(run_actor(name, options.runtime_dir, lifeline))


def calibrate(
    whole: Callable[..., StepCosts], group: Path, cores: float, *given: object, **named: object
) -> StepCosts:
    """The worker's step costs: those that ``whole`` gives for a whole core, scaled to the worker's part.

    Measuring takes seconds; ``whole`` remembers the result, so that not every worker measures again. Then the
    process enters its control group.
    """
    engine, resolved, threads, kind, _ = given
    costs = whole(engine, resolved, threads, kind, lambda: None, **named)
    enter(group)
    return costs.scaled(1 / cores)


def main() -> int:
    """Be the cluster or its zygote."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cluster, zygote = commands.add_parser("up"), commands.add_parser("zygote")
    cluster.add_argument("--cores", type=parts, required=True, help="by worker: p0=0.25,d0=0.7")
    cluster.add_argument("--config", "-c", required=True)
    cluster.add_argument("--set", action="append", default=[])
    zygote.add_argument("own", type=json.loads, help="JSON: by worker, its control group and part of a core")
    zygote.add_argument("modules", nargs="*")
    zygote.add_argument("--runtime-dir", required=True)
    zygote.add_argument("--orders", type=int, required=True)
    options = parser.parse_args()
    if options.command == "zygote":
        fork_actors(options)
    up(options.cores, options.config, options.set)
    return 0


if __name__ == "__main__":
    sys.exit(main())
