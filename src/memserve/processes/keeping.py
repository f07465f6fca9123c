"""Keeps actors running: handles their events and restarts those that die, with growing delays."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Callable

import attrs
import structlog
import trio

from memserve.errors import UserError
from memserve.identity import ActorId
from memserve.processes.child import OUTPUT_SHOWN_LINES, Child
from memserve.processes.lifecycle import STATUS_USER_ERROR, Restart, describe_end
from memserve.processes.zygote import Zygote

log = structlog.get_logger()


SAY_MS = 100
"""Longest wait for a reader of our output, in milliseconds."""


def say(line: str) -> None:
    """Print a line for the user, or drop what is left of it after SAY_MS.

    A pipe or terminal that is closed, or that takes nothing (after Ctrl-S, or because its reader is stopped),
    is no reason to stop serving.
    """
    try:
        output = sys.stdout.fileno()
    except (OSError, AttributeError):  # not a file, as in tests, or closed before the start
        print(line, flush=True)
        return
    data = f"{line}\n".encode(errors="replace")
    room = select.poll()
    room.register(output, select.POLLOUT)
    with contextlib.suppress(OSError):
        while data and room.poll(SAY_MS):
            data = data[os.write(output, data[: select.PIPE_BUF]) :]


@attrs.define(eq=False)
class Keeper:
    """Keeps actors running, as the module describes. One keeper serves for all actors of a supervisor."""

    zygote: Zygote
    run_dir: str
    """The directory of the actors' logs."""
    say: Callable[[str], None] = say
    started: Callable[[], bool] = lambda: False
    """Whether start-up has ended.

    Until then an actor's UserError ends everything; later it counts as another death.
    """
    on_event: Callable[[Child, dict[str, str]], None] = lambda child, event: None
    """Called with each event of an actor, after the keeper has handled it."""
    on_end: Callable[[ActorId], None] = lambda actor: None
    """Called with each incarnation that has ended."""
    on_leave: Callable[[Child, int], None] = lambda child, returncode: None
    """Called with an actor that ended as it was asked to, and its exit status."""
    on_status: Callable[[Child], None] = lambda child: None
    """Called with an actor that died or is ready again; ``child.down`` is then the reason or empty."""

    async def keep(self, child: Child) -> None:
        """Keep one actor running until it is asked to leave.

        Raises UserError if the actor has one during start-up.
        """
        while not child.leaving.is_set():
            returncode = await self._incarnation(child)
            if child.leaving.is_set():
                self.on_leave(child, returncode)
                break
            if returncode == STATUS_USER_ERROR and not self.started():
                raise UserError(child.text())
            now = trio.current_time()
            restart = child.policy.died(child.ready_s(now), now)
            self._report(child, returncode, restart)
            # After all reports of the death: this may have to wait for another actor's fork.
            await self.zygote.end_orphans()
            with trio.move_on_after(restart.delay_s):
                await child.leaving.wait()
        child.gone.set()
        await self.zygote.end_orphans()

    async def _incarnation(self, child: Child) -> int:
        try:
            return await child.live(self.zygote, self._listen)
        finally:
            if child.id is not None:
                self.zygote.place.remove_files_of(child.id)
                self.on_end(child.id)

    async def _listen(self, child: Child) -> None:
        """Handle an actor's events on its lifeline."""
        assert child.events is not None
        while (event := await child.events.receive()) is not None:
            child.heard_at = trio.current_time()
            if event["event"] == "hello":
                child.id = ActorId(event["id"])
            elif event["event"] == "ready":
                self._ready(child)
            elif event["event"] == "leaving":
                child.leaving.set()
                log.info("actor leaves", child=child.id)
            self.on_event(child, event)

    def _ready(self, child: Child) -> None:
        child.ready_at, child.down = trio.current_time(), ""
        self.on_status(child)
        seconds = child.ready_at - child.started_at
        log.info("actor ready", child=child.id, ready_s=round(seconds, 2))
        if child.restarts and self.started():
            self.say(f"memserve: {child.spec.name} is back, {seconds:.1f} s after its restart")

    def _report(self, child: Child, returncode: int, restart: Restart) -> None:
        """Report a death to the user and the log, one line each, with the end of the actor's output."""
        name, end = child.spec.name, "hung and was killed" if child.hung else describe_end(returncode)
        fields = {"child": child.id or name, "returncode": returncode, "restart_in_s": restart.delay_s}
        log.warning("actor died", **fields, looping=restart.looping, output=child.text())
        child.restarts += 1
        child.down = f"{end} and is being restarted"
        if restart.looping:
            child.down = f"{end} again and again; it is tried every {restart.delay_s:g} s"
        self.on_status(child)
        if restart.looping and not restart.newly_looping:
            return
        words = "".join(f"\n  {name} | {line}" for line in child.text().splitlines()[-OUTPUT_SHOWN_LINES:])
        next_step = "restarting it" + (f" in {restart.delay_s:g} s" if restart.delay_s else "")
        if restart.newly_looping:
            next_step = (
                f"the {child.policy.loop_deaths}th time in a row; the others go on, and it is"
                f" tried again every {restart.delay_s:g} s, see {self.run_dir}/{name}.jsonl"
            )
        self.say(f"memserve: {name} {end}; {next_step}{words}")
