"""``memserve up`` runs one process per actor: starts all, restarts dead ones, drains in order, leaves none.

Decisions are made in :mod:`memserve.processes.lifecycle`; this module carries them out. The supervisor only
ever waits: for signals and for its children's pidfds, lifelines and output. So an idle cluster costs it
nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import attrs
import structlog
import trio

from memserve import observe
from memserve.api.listening import check_port
from memserve.config import Resolved
from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.processes.actor import leaves, modules_of
from memserve.processes.child import OUTPUT_TAIL_BYTES, Child, all_gone, end_now
from memserve.processes.gate import Gate, Guest
from memserve.processes.keeping import Keeper, say
from memserve.processes.lifecycle import (
    HUNG_S,
    STATUS_USER_ERROR,
    WORKER_KINDS,
    RestartPolicy,
    StopSignals,
    describe_end,
    drain_stages,
    roster,
)
from memserve.processes.place import Place, now_utc
from memserve.processes.zygote import Zygote
from memserve.settings.configfile import load
from memserve.settings.resolve import resolve

log = structlog.get_logger()

LATE_S = 0.5
"""A wait that takes longer is reported to the user while it lasts."""


@attrs.define(eq=False)
class Supervisor:
    """Runs one cluster until a signal ends it.

    The caller claims the place before and leaves it afterwards.
    """

    resolved: Resolved
    zygote: Zygote
    prepare_argv: Sequence[str] = ()
    """Command that prepares the weights before any actor starts; empty for none."""
    policy: Callable[[], RestartPolicy] = RestartPolicy
    say: Callable[[str], None] = say
    stage_s: float = 5.0
    """Longest drain of a stage of actors; those that serve requests have frontend.drain_s instead."""
    stop_s: float = 2.0
    """Time from a second signal to SIGKILL."""
    hung_s: float = HUNG_S
    """Longest silence of a ready actor on its lifeline."""
    _children: dict[str, Child] = attrs.field(init=False)
    _keeper: Keeper = attrs.field(init=False)
    _gate: Gate = attrs.field(init=False)
    _begun: str = attrs.field(init=False, factory=now_utc)
    _begun_at: float = attrs.field(init=False, default=0.0)
    _state: str = attrs.field(init=False, default="starting")
    _started: bool = attrs.field(init=False, default=False)
    """Whether the start of actors has begun, so that some may have to be drained."""
    _invited: bool = attrs.field(init=False, default=False)
    """Whether the user was informed that other hosts may join."""
    _serving: trio.Event = attrs.field(init=False, factory=trio.Event)
    """Set for good at the end of start-up.

    Every Frontend has served once then, and, in a cluster of several hosts, all actors of this one are ready.
    """

    def __attrs_post_init__(self) -> None:
        self._children = {
            spec.name: Child(spec, self.policy(), self.hung_s) for spec in roster(self.resolved)
        }
        self._keeper = Keeper(
            self.zygote, self.resolved.run_dir, self.say, self._serving.is_set, self._on_event,
            self._announce_death, self._left, self._tell_frontends,
        )  # fmt: skip
        self._gate = Gate(
            self.zygote.place, lambda: self.resolved, self._replace_config, self._announce_death,
            lambda: self._state != "draining", self.say,
        )  # fmt: skip

    async def run(self) -> None:
        """Start all actors and supervise them until a signal has ended the cluster and no process is left.

        Raises UserError, within exception groups, when an actor cannot start for a reason that the user can
        remove.
        """
        self._begun_at = trio.current_time()
        self._write_info()
        with trio.open_signal_receiver(*stop_signals()) as signals:
            # The zygote imports while the weights are prepared.
            async with self.zygote, trio.open_nursery() as nursery:
                nursery.start_soon(self._obey, signals, nursery.cancel_scope)
                await self._prepare()
                await self._find_cluster()
                self.say(
                    f"memserve: starting {len(self._children)} actors; logs are in {self.resolved.run_dir}"
                )
                self._started = True
                nursery.start_soon(self._announce)
                await nursery.start(self._gate.run)
                await self._keep_all()
                nursery.cancel_scope.cancel()
        log.info("cluster stopped")
        self.say("memserve: stopped")

    def _enter(self, state: str) -> None:
        """Enter the state ``ready`` or ``draining``; commands and actors can read it."""
        self._state = state
        self._update_info()

    def _update_info(self) -> None:
        """Write cluster.json again.

        A full disk is no reason to end the cluster: readers then see the earlier state.
        """
        try:
            self._write_info()
        except UserError as error:
            log.error("cluster.json not written", reason=str(error))
            self.say(f"memserve: {error}")

    def _write_info(self) -> None:
        """Write cluster.json. Raises UserError."""
        self.zygote.place.write_info(
            {
                "pid": os.getpid(),
                "state": self._state,
                "url": self._url(),
                "started_at": self._begun,
                "resolved": json.loads(self.resolved.to_json()),
            }
        )

    def _url(self) -> str | None:
        return next((child.url for child in self._children.values() if child.url), None)

    def _everyone(self) -> list[Child | Guest]:
        """All actors, including those that joined from other terminals."""
        return [*self._children.values(), *self._gate.guests.values()]

    def _of_kind(self, kind: str) -> list[Child]:
        return [child for child in self._children.values() if child.spec.kind == kind]

    # -- start-up --

    async def _prepare(self) -> None:
        """Prepare the weights in a process of its own, so that this one stays small. Raises UserError."""
        if not self.prepare_argv:
            return
        stdin, alive = os.pipe()  # the process ends when ``alive`` is closed, by us or by our death
        try:
            # Not "converting": on a busy machine it can take this long to find that they are already
            # converted.
            async with self._saying(f"readying the weights of {self.resolved.model_path} (converted once)"):
                done = await trio.run_process(
                    list(self.prepare_argv),
                    stdin=stdin,
                    capture_stdout=True,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
        finally:
            os.close(stdin)
            os.close(alive)
        if done.returncode != 0:
            text = done.stdout[-OUTPUT_TAIL_BYTES:].decode(errors="replace").strip()
            log.error("weights not ready", returncode=done.returncode, output=text)
            known = done.returncode == STATUS_USER_ERROR
            raise UserError(
                text if known else f"preparing the weights {describe_end(done.returncode)}:\n{text}"
            )

    async def _find_cluster(self) -> None:
        """Wait for the scheduler's host, where that is another one.

        Raises UserError when it does not let this host in.
        """
        network = self.resolved.network
        if network is None or not network.joins:
            return
        from memserve.bus import wait_for_head  # only where there is a network: a supervisor stays small

        def on_no_answer() -> None:
            log.warning("cluster not found yet", head=network.head)
            self.say(f"memserve: waiting for the cluster: no answer at {network.head}")

        await wait_for_head(network.head, network.keys, on_no_answer)
        log.info("cluster found", head=network.head)
        self.say(f"memserve: found the cluster at {network.head}; this host is {network.address} in it")

    async def _announce(self) -> None:
        """Tell the user, once, where to send a request."""
        await self._serving.wait()
        self._enter("ready")
        seconds = trio.current_time() - self._begun_at
        urls = [child.url for child in self._children.values() if child.url]
        log.info("cluster ready", url=urls[0], ready_s=round(seconds, 2))
        self.say(
            f"memserve: ready in {seconds:.1f} s at {', '.join(dict.fromkeys(urls))}; Ctrl-C drains and stops it\n"
        )
        self.say(curl(urls[0], self.resolved))

    @contextlib.asynccontextmanager
    async def _saying(self, text: str) -> AsyncIterator[None]:
        """Tell the user what is being waited for, if it takes longer than LATE_S."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._say_late, text)
            yield
            nursery.cancel_scope.cancel()

    async def _say_late(self, text: str) -> None:
        await trio.sleep(LATE_S)
        self.say(f"memserve: {text}")

    # -- keeping actors running --

    async def _keep_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for child in self._children.values():
                nursery.start_soon(self._keeper.keep, child)

    def _on_event(self, child: Child, event: dict[str, str]) -> None:
        if event["event"] == "hello" and child.spec.kind == "Frontend":
            for other in self._children.values():
                self._tell_fate(child, other)
        elif event["event"] == "serving":
            child.url = event["url"]
            self._update_info()  # a successor may serve on another port if frontend.port is 0
        if event["event"] in ("serving", "ready"):
            self._check_started()

    def _check_started(self) -> None:
        """Check whether start-up has ended.

        In a cluster of several hosts, this host's own actors must be ready, too.
        """
        network = self.resolved.network
        ready = not network or all(child.ready_at < math.inf for child in self._children.values())
        if network and ready and not network.joins and not self._invited:
            self._invited = True
            self.say(f"memserve: all actors of this host are ready; others join it at {network.head}")
        if ready and all(frontend.url for frontend in self._of_kind("Frontend")):
            self._serving.set()

    def _left(self, child: Child, returncode: int) -> None:
        """Report an actor that an operator drained while the cluster continues."""
        if self._state != "draining":
            log.info("actor left", child=child.id, returncode=returncode)
            self.say(f"memserve: {child.spec.name} was drained and {describe_end(returncode)}")

    def _announce_death(self, actor: ActorId) -> None:
        """Report a death to the scheduler; if that is elsewhere, through this host's other actors."""
        network = self.resolved.network
        far = network is not None and network.joins
        for child in self._children.values() if far else self._of_kind("GlobalScheduler"):
            if child.events is not None:
                child.events.send(event="died", id=actor)

    def _tell_frontends(self, child: Child) -> None:
        """Tell the Frontends, for /health, whether an actor is down, and why."""
        for frontend in self._of_kind("Frontend"):
            self._tell_fate(frontend, child)

    def _tell_fate(self, frontend: Child, child: Child) -> None:
        if frontend.events is None:
            return
        if child.down:
            frontend.events.send(event="down", name=child.spec.name, why=child.down)
        else:
            frontend.events.send(event="up", name=child.spec.name)

    def _replace_config(self, resolved: Resolved) -> None:
        """Replace the configuration after a worker joined or left; actors read it when they start.

        Raises UserError when it is replaced but could not be written.
        """
        self.resolved = resolved
        self._write_info()

    # -- stopping --

    async def _obey(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        """Drain at the first signal, stop at once at the second."""
        meaning = StopSignals()
        async with trio.open_nursery() as nursery:
            async for number in signals:
                step = meaning.received(trio.current_time())
                log.info("signal received", signal=signal.Signals(number).name, step=step)
                if step == "drain" and not self._started:
                    everything.cancel()
                elif step == "drain":
                    nursery.start_soon(self._drain)
                elif step == "stop":
                    nursery.cancel_scope.cancel()
                    break
        await self._stop_now()

    async def _drain(self) -> None:
        """End the actors stage by stage, each with a time limit."""
        self.say("memserve: draining; a second Ctrl-C stops at once")
        self._enter("draining")
        everyone = {one.spec.name: one for one in self._everyone()}
        for stage in drain_stages(one.spec for one in everyone.values()):
            # Workers of a cluster of several hosts may still serve requests of other hosts' Frontends; those
            # of this host's Frontends have ended by now.
            serves = stage[0].kind == "Frontend" or (self.resolved.network and stage[0].kind in WORKER_KINDS)
            limit_s = self.resolved.config.frontend.drain_s if serves else self.stage_s
            await self._drain_stage([everyone[spec.name] for spec in stage], limit_s)

    async def _drain_stage(self, stage: Sequence[Child | Guest], limit_s: float) -> None:
        names = ", ".join(child.spec.name for child in stage)
        for child in stage:
            child.ask_to_drain()
        async with self._saying(f"waiting for {names} to finish, at most {limit_s:g} s"):
            await all_gone(stage, limit_s)
        for child in stage:
            if not child.gone.is_set():
                log.warning("actor did not drain", child=child.id, limit_s=limit_s)
                self.say(f"memserve: {child.spec.name} did not finish within {limit_s:g} s and is killed")
                child.kill()
        await all_gone(stage)

    async def _stop_now(self) -> None:
        self.say("memserve: stopping at once")
        await end_now(self._everyone(), self.stop_s)


def stop_signals() -> list[int]:
    """The signals that end a supervisor.

    SIGHUP is not one if it was started to survive its terminal (nohup).
    """
    hangup = [] if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def curl(url: str, resolved: Resolved) -> str:
    """A first request to copy into a shell. Keys are not shown: the user knows them."""
    question = [{"role": "user", "content": "What is virtual memory?"}]
    body = json.dumps({"model": resolved.spec.name, "messages": question, "max_tokens": 64})
    key = " \\\n    -H 'Authorization: Bearer YOUR_API_KEY'" if resolved.config.frontend.api_keys else ""
    return f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n    -d '{body}'\n"


# ---- the command ---------------------------------------------------------------------------------------------

PREPARE = "import sys; from memserve.processes.actor import prepare_weights; sys.exit(prepare_weights(*sys.argv[1:]))"


def up(config_path: str, overrides: Sequence[str] = ()) -> int:
    """Run the cluster of a configuration until it is stopped; the exit status.

    Raises UserError for a wrong configuration, a place or port that is taken, or an actor that cannot start
    for a reason that the user can change.
    """
    settings = load(config_path, overrides)
    place = Place.claim(Path(settings.logging.dir))
    try:
        # A Frontend checks the port itself, but only after all the others have been started and models
        # loaded.
        check_port(settings.frontend.host, settings.frontend.port)
        resolved = resolve(settings)
        zygote = Zygote(place, modules_of(roster(resolved), resolved))
        supervise(Supervisor(resolved, zygote, prepare_argv=prepare_argv(resolved)))
    except KeyboardInterrupt:  # before trio took over the signals: nothing has been started
        return 128 + signal.SIGINT
    finally:
        place.leave()
    return 0


def prepare_argv(resolved: Resolved) -> list[str]:
    """The command that prepares the weights and the native step for a cluster."""
    model = resolved.config.model
    words = [sys.executable, "-c", PREPARE, resolved.model_path, model.stored, model.dtype]
    return [*words, "on GPUs"] if resolved.on_gpus else words


def supervise(supervisor: Supervisor) -> None:
    """Run a cluster's supervisor to its end. Raises UserError."""
    run_supervisor(supervisor.run, supervisor.resolved, "supervisor")


def run_supervisor(run: Callable[[], Awaitable[None]], resolved: Resolved, name: str) -> None:
    """Open the log of a supervisor and run it to its end. Raises the UserErrors of its actors as one UserError."""
    log_file, level = Path(resolved.run_dir) / f"{name}.jsonl", resolved.config.logging.level
    observe.configure(log_file, level, actor=name, kind="Supervisor", pid=os.getpid())
    try:
        trio.run(run)
    except BaseExceptionGroup as group:
        wrong, others = group.split(UserError)
        if wrong is None or others is not None:
            raise
        raise UserError("\n".join(dict.fromkeys(str(error) for error in leaves(wrong)))) from None
