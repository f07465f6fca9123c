"""``memserve join`` adds a worker to a running cluster and keeps it running, as a small supervisor.

The host's supervisor lets the worker in and reports when the cluster drains, see
:mod:`memserve.processes.gate`. The worker's process is a child of this one and restarted like any actor. It
maps its shard's arena, so it runs on the shard's host.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import msgspec
import structlog
import trio

from memserve.config import Resolved
from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.processes.actor import modules_of
from memserve.processes.child import Child, end_now
from memserve.processes.gate import SOCKET_NAME
from memserve.processes.keeping import Keeper, say
from memserve.processes.lifecycle import (
    HUNG_S,
    STATUS_DRAINED,
    RestartPolicy,
    StopSignals,
    describe_end,
    worker_spec,
)
from memserve.processes.lifeline import LINE_BYTES_MAX, EventSocket
from memserve.processes.place import Place, PlaceGone, find_running
from memserve.processes.zygote import Zygote
from memserve.settings.configfile import load
from memserve.settings.gpus import Gpus, device_index, find_gpus
from memserve.settings.machine import usable_cores
from memserve.settings.rules import size_text
from memserve.settings.sections import WorkerConfig
from memserve.supervisor import run_supervisor, stop_signals

log = structlog.get_logger()

ANSWER_S = 10.0
"""Longest wait for the supervisor's answer."""


@attrs.define(eq=False)
class Joiner:
    """Keeps the joined worker running until a signal, an operator's drain or the cluster's end."""

    resolved: Resolved
    worker: WorkerConfig
    zygote: Zygote
    gate: EventSocket
    """The connection to the cluster's supervisor."""
    where: str = ""
    """The cluster's address, for messages to the user."""
    policy: Callable[[], RestartPolicy] = RestartPolicy
    say: Callable[[str], None] = say
    stop_s: float = 2.0
    """Time from a second signal to SIGKILL."""
    hung_s: float = HUNG_S
    _child: Child = attrs.field(init=False)
    _keeper: Keeper = attrs.field(init=False)
    _was_ready: bool = attrs.field(init=False, default=False)

    def __attrs_post_init__(self) -> None:
        self._child = Child(worker_spec(self.worker), self.policy(), self.hung_s)
        self._keeper = Keeper(
            self.zygote, self.resolved.run_dir, self.say, lambda: self._was_ready, self._on_event, self._announce_death,
            self._left,
        )  # fmt: skip

    async def run(self) -> None:
        """Serve until the worker has left.

        Raises UserError, within exception groups, when it cannot start.
        """
        log.info("worker joins", child=self.worker.name, role=self.worker.role, shard=self.worker.shard)
        with trio.open_signal_receiver(*stop_signals()) as signals:
            async with self.zygote, trio.open_nursery() as nursery:
                nursery.start_soon(self._obey, signals)
                nursery.start_soon(self._follow_the_cluster)
                await self._keeper.keep(self._child)
                nursery.cancel_scope.cancel()
        log.info("worker left", child=self.worker.name)

    def _on_event(self, child: Child, event: dict[str, str]) -> None:
        if event["event"] == "hello":
            self.gate.send(event="hello", id=event["id"])
        elif event["event"] == "ready" and not self._was_ready:
            self._was_ready = True
            seconds = child.ready_at - child.started_at
            self.say(
                f"memserve: {self.worker.name} is ready in {seconds:.1f} s: role {self.worker.role}, on"
                f" {self.worker.shard}{self.where}; Ctrl-C lets it finish its requests and leave"
            )

    def _announce_death(self, actor: ActorId) -> None:
        self.gate.send(event="died", id=actor)

    def _left(self, child: Child, returncode: int) -> None:
        how = "" if returncode == STATUS_DRAINED else f": it {describe_end(returncode)}"
        self.say(f"memserve: {child.spec.name} has left{how}")

    async def _follow_the_cluster(self) -> None:
        """Drain when the cluster drains, and stop when its supervisor is gone."""
        while (event := await self.gate.receive()) is not None:
            if event["event"] == "drain":
                log.info("cluster drains")
                self.say(f"memserve: the cluster drains, and {self.worker.name} with it")
                self._child.ask_to_drain()
        log.warning("cluster gone")
        self.say(f"memserve: the cluster has ended, and {self.worker.name} with it")
        await self._stop_now()

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        """Drain at the first signal, stop at once at the second."""
        meaning = StopSignals()
        async for number in signals:
            step = meaning.received(trio.current_time())
            log.info("signal received", signal=signal.Signals(number).name, step=step)
            if step == "drain":
                self.say(
                    f"memserve: {self.worker.name} takes no new requests and finishes those it has; a second Ctrl-C"
                    " stops it at once, and other workers continue them"
                )
                self._child.ask_to_drain()
            elif step == "stop":
                await self._stop_now()

    async def _stop_now(self) -> None:
        await end_now([self._child], self.stop_s)


# ---- the command ---------------------------------------------------------------------------------------------


def join(
    worker: dict[str, Any],
    log_dir: Path,
    zygote: Callable[[Place, Sequence[str]], Zygote] = Zygote,
    hung_s: float = HUNG_S,
) -> int:
    """Add a worker, given by WorkerConfig's fields, to the cluster that logs to ``log_dir``; the exit status.

    Returns when the worker has left. Raises UserError when there is no such cluster, when the cluster refuses
    the worker, and when this machine does not have what the worker needs.
    """
    resolved, where = running_cluster(log_dir)
    joining = checked(worker, resolved)
    cores = usable_cores()
    check_machine(joining, resolved, cores)
    runtime_dir = Path(resolved.runtime_dir)
    gate, claim_fd = ask_to_join(runtime_dir, joining, cores)
    try:
        place = Place.join(runtime_dir, claim_fd)
    except PlaceGone as error:
        raise UserError(str(error)) from error
    try:
        if len(resolved.config.worker) + 1 > resolved.cores:
            say(
                f"memserve: {len(resolved.config.worker) + 1} workers share {resolved.cores} cores of this host"
            )
        modules = modules_of([worker_spec(joining)], resolved)
        joiner = Joiner(resolved, joining, zygote(place, modules), gate, where, hung_s=hung_s)
        run_supervisor(joiner.run, resolved, f"supervisor-{joining.name}")
    finally:
        gate.close()
        place.leave()
    return 0


def running_cluster(log_dir: Path) -> tuple[Resolved, str]:
    """What the cluster that logs to ``log_dir`` has decided, and " of" its URL, once it has one.

    Raises UserError when there is none.
    """
    running = find_running(log_dir)
    if running is None:
        raise UserError(
            f"no running memserve logs to {log_dir.resolve()}; start one with `memserve up`, or give --config or"
            " --log-dir"
        )
    try:
        resolved = Resolved.from_json(json.dumps(running["resolved"]).encode())
    except msgspec.MsgspecError as error:
        raise UserError(
            f"the cluster that logs to {log_dir.resolve()} was started by another version of memserve: restart it"
        ) from error
    return resolved, f" of {running['url']}" if running.get("url") else ""


def log_dir_of(config: str | None, overrides: Sequence[str], log_dir: Path | None) -> Path:
    """The log directory of the cluster to join. Raises UserError."""
    if config is None:
        if overrides:
            raise UserError("--set requires --config: it overrides the file's values")
        return log_dir or Path("logs")
    if log_dir is not None:
        raise UserError("give either --config or --log-dir: both say which cluster to join")
    return Path(load(config, overrides).logging.dir)


def how_hosts_join(head: str) -> str:
    """The text that explains how another host joins."""
    place = head.removeprefix("tcp://")
    return (
        f"cannot join {head}: a worker maps the memory of its shard, so it must join on"
        " the shard's host. A host joins a cluster with"
        f' `memserve up` and a configuration that has shards, workers, and [cluster] with join = "{place}"'
    )


def checked(worker: dict[str, Any], resolved: Resolved) -> WorkerConfig:
    """The worker's configuration; its shard defaults to the cluster's only one.

    Raises UserError with every broken rule.
    """
    shards = [shard.name for shard in resolved.config.shard]
    if not worker.get("shard"):
        if len(shards) > 1:
            raise UserError(f"--shard must be one of {', '.join(shards)}: the cluster has several")
        worker = {**worker, "shard": shards[0]}
    wrong = [
        f"--{field.name} must {field.metadata['rule'].text}, not {worker[field.name]!r}"
        for field in attrs.fields(WorkerConfig)
        if field.metadata["rule"] and not field.metadata["rule"].holds(worker[field.name])
    ]
    if wrong:
        raise UserError("\n".join(wrong))
    return WorkerConfig(**worker)


def check_machine(
    worker: WorkerConfig, resolved: Resolved, cores: int, gpus: Callable[[], Gpus] = find_gpus
) -> None:
    """Raise UserError where the worker needs more cores, or more free memory on the GPU, than there are."""
    if worker.threads is not None and worker.threads > cores:
        raise UserError(
            f"--threads must be at most {cores}, the cores that this process may use, not {worker.threads}"
        )
    device = next((one.device for one in resolved.config.shard if one.name == worker.shard), "cpu")
    index = device_index(device)
    if index is None:
        return
    found = gpus()
    gpu = found.get(index)
    if found.problem or gpu is None:
        raise UserError(
            f"the shard {worker.shard} is on {device}, but {found.problem or 'this machine does not have that GPU'}"
        )
    if gpu.free_bytes < resolved.gpu_worker_bytes:
        raise UserError(
            f"a worker needs {size_text(resolved.gpu_worker_bytes)} of {device}, and {size_text(gpu.free_bytes)} are free: start"
            f" the cluster with less memory for the shard {worker.shard}"
        )


def ask_to_join(runtime_dir: Path, worker: WorkerConfig, cores: int) -> tuple[EventSocket, int]:
    """Ask the cluster's supervisor to let a worker in; the connection to it and the claim's descriptor.

    Raises UserError.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ANSWER_S)
        connection.connect(str(runtime_dir / SOCKET_NAME))
        request = {"event": "join", "worker": msgspec.json.encode(worker).decode(), "cores": str(cores)}
        connection.sendall(json.dumps(request).encode() + b"\n")
        data, descriptors, _, _ = socket.recv_fds(connection, LINE_BYTES_MAX, 1)
    except (OSError, TimeoutError) as error:
        connection.close()
        raise UserError(
            "memserve runs here but accepts no worker now: it is starting or ending; try again in a moment"
        ) from error
    line, _, rest = data.partition(b"\n")
    answer = json.loads(line) if line else {}
    if answer.get("event") != "welcome" or not descriptors:
        connection.close()
        raise UserError(answer.get("reason", "the cluster is ending"))
    return EventSocket(connection, bytearray(rest)), descriptors[0]
