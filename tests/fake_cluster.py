"""A cluster of real processes whose actors only live and die, for tests of the supervisor and of actors.

``python fake_cluster.py up LOG_DIR BEHAVIOUR`` supervises; ``python fake_cluster.py join LOG_DIR BEHAVIOUR
NAME`` adds a worker; ``python fake_cluster.py zygote DIR FD`` forks actors. BEHAVIOUR is a JSON object
``{actor name: word}``; see ``main`` for the words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from memserve.config import Config, Resolved
from memserve.engine.spec import ModelSpec
from memserve.errors import UserError
from memserve.processes import actor as process
from memserve.processes import join
from memserve.processes.actor import ActorContext, RestartNeeded
from memserve.processes.lifecycle import RestartPolicy
from memserve.processes.place import Place, place_path
from memserve.processes.zygote import Zygote, end, serve
from memserve.settings.sections import FrontendConfig, ModelConfig, ShardConfig, WorkerConfig
from memserve.supervisor import Supervisor, supervise

HUNG_S = 4.0
"""Silence after which an actor counts as hung: two of its heartbeats."""
STARTED: list[subprocess.Popen[bytes]] = []
"""What an actor has started. As long as these exist, nobody waits for the processes."""
SPEC = ModelSpec("fake", "llama", 1, 8, 8, 1, 1, 8, 16, 1e4, 1e-5, 64, True, None, (), None)


def resolved(log_dir: Path, workers: int = 1, drain_s: float = 5.0) -> Resolved:
    """One scheduler, one shard, one Frontend and ``workers`` workers."""
    config = Config(
        model=ModelConfig(path="fake.gguf"),
        shard=(ShardConfig(name="s0"),),
        worker=tuple(WorkerConfig(name=f"w{i}", shard="s0") for i in range(workers)),
        frontend=FrontendConfig(drain_s=drain_s),
    )
    return Resolved(
        config=config,
        model_path="fake.gguf",
        spec=SPEC,
        max_context=64,
        page_bytes=1,
        shard_pages={"s0": 1},
        threads={},
        cores=1,
        run="run",
        log_dir=str(log_dir),
        runtime_dir=str(place_path(log_dir)),
        reasons=(),
    )


def argv(runtime_dir: Path, modules: Sequence[str], orders_fd: int) -> list[str]:
    return [sys.executable, __file__, "zygote", str(runtime_dir), str(orders_fd)]


def note(context: ActorContext, word: str) -> None:
    """Write one line to LOG_DIR/notes, in a single append: lines of several actors keep their order."""
    with (Path(context.resolved.log_dir) / "notes").open("a") as notes:
        notes.write(f"{word} {context.name} {os.getpid()}\n")


async def main(context: ActorContext, *, task_status: trio.TaskStatus[None]) -> None:
    """An actor with a socket file, which behaves as its word says and otherwise drains when asked to."""
    word = json.loads(os.environ["FAKE_BEHAVIOUR"]).get(context.name)
    context.place.socket_path(f"{context.id}.sock").touch()
    if word == "parent":
        commands = ("sleep 60 & wait", "true")
        STARTED.extend(subprocess.Popen(["sh", "-c", one]) for one in commands)  # noqa: ASYNC220
    if word == "user error":
        raise UserError("frontend.port: 80 is taken; choose another with --set frontend.port=8081")
    if word == "crash":
        raise RuntimeError("the crash of the test")
    if word == "restart":
        raise RestartNeeded("shard s0 is gone")
    task_status.started()
    note(context, "ready")
    if context.kind == "Frontend":
        context.lifeline.serving("http://127.0.0.1:1")
    async with trio.open_nursery() as nursery:
        if context.kind == "GlobalScheduler":
            nursery.start_soon(note_deaths, context)
        if context.kind == "Frontend":
            nursery.start_soon(note_down, context)
        if word == "hung":
            nursery.start_soon(trio.to_thread.run_sync, time.sleep, 60)
        if word == "blocked":
            time.sleep(60)  # noqa: ASYNC251 - the point
        if word == "deaf":
            await trio.sleep_forever()
        await context.lifeline.drain.wait()
        nursery.cancel_scope.cancel()
    note(context, "drained")


async def note_deaths(context: ActorContext) -> None:
    async for actor in context.lifeline.died:
        note(context, f"died:{actor}")


async def note_down(context: ActorContext) -> None:
    """Write a line to LOG_DIR/down whenever the supervisor's report of actors that are down changes."""
    known: dict[str, str] = {}
    while True:
        if known != context.lifeline.down:
            known = dict(context.lifeline.down)
            with (Path(context.resolved.log_dir) / "down").open("a") as lines:
                lines.write(json.dumps(known) + "\n")
        await trio.sleep(0.005)


def up(log_dir: Path, behaviour: dict[str, str]) -> int:
    """Supervise until a signal arrives; the exit status."""
    os.environ["FAKE_BEHAVIOUR"] = json.dumps(behaviour)
    try:
        place = Place.claim(log_dir)
        try:
            zygote = Zygote(place, argv=argv)
            policy = partial(RestartPolicy, loop_deaths=3)
            supervise(
                Supervisor(resolved(log_dir), zygote, policy=policy, stage_s=2.0, stop_s=0.3, hung_s=HUNG_S)
            )
        finally:
            place.leave()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def join_cluster(log_dir: Path, behaviour: dict[str, str], name: str) -> int:
    """Supervise one additional worker until it leaves; the exit status."""
    os.environ["FAKE_BEHAVIOUR"] = json.dumps(behaviour)
    worker = {"name": name, "role": "decode", "shard": "", "threads": None}
    try:
        return join.join(worker, log_dir, partial(Zygote, argv=argv), hung_s=HUNG_S)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    if sys.argv[1] == "up":
        sys.exit(up(Path(sys.argv[2]), json.loads(sys.argv[3])))
    elif sys.argv[1] == "join":
        sys.exit(join_cluster(Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]))
    else:
        process.MODULES = dict.fromkeys(process.MODULES, "fake_cluster")
        actor_name, lifeline = serve(sys.argv[2], ["fake_cluster"], int(sys.argv[3]))
        end(process.run_actor(actor_name, sys.argv[2], lifeline))
