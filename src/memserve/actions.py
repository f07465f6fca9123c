"""What a core asks its shell to do, as values. Cores never act: they return these from ``take()``."""

from __future__ import annotations

import attrs

from memserve.drawing import Logprobs, PromptLogprobs
from memserve.engine.plans import BatchPlan, BatchResult
from memserve.errors import RequestFailed
from memserve.identity import ActorId
from memserve.messages import Message


@attrs.frozen
class Send:
    """Send ``message`` to ``to``. The shell may fail to (peer gone, queue full); cores repeat what must arrive."""

    to: ActorId
    message: Message


@attrs.frozen
class Log:
    """Write one structured line. ``event`` is a stable name; ``data`` has units in its keys."""

    level: str
    event: str
    data: dict[str, object] = attrs.field(factory=dict)


@attrs.frozen
class Deliver:
    """New tokens for the client of ``request``, its end (``finish``), or its failure."""

    request: str
    tokens: tuple[int, ...]
    finish: str | None
    cached_tokens: int
    failure: RequestFailed | None = None
    logprobs: tuple[Logprobs, ...] = ()
    """One for each token, where they were asked for."""
    prompt: tuple[PromptLogprobs, ...] = ()
    """What is new of the prompt's, where those were asked for."""


@attrs.frozen
class Stop:
    """This actor cannot go on (fenced off, or its shard is gone): leave, so that a successor starts clean."""

    reason: str


@attrs.frozen
class RunBatch:
    """Run one step; its result comes back to the core as :class:`BatchDone`."""

    plan: BatchPlan


@attrs.frozen
class BatchDone:
    """Not an action but its answer: the step is over."""

    result: BatchResult


@attrs.frozen
class Died:
    """From the supervisor: a process has ended. The scheduler need not wait for its silence."""

    actor: ActorId


@attrs.frozen
class Overslept:
    """From this actor's own clock: it was stopped for a while, and has not heard what others said meanwhile."""


@attrs.frozen
class Kill:
    """End a process that was declared dead but may only sleep, before the pages it could still write to are granted anew."""

    actor: ActorId
    pid: int


@attrs.frozen
class Copy:
    """Copy pages between the tiers of a shard; the end comes back to the core as :class:`CopyDone`, whatever happens."""

    id: int
    runs: tuple[tuple[int, int, int], ...]
    """(first source slot, first target slot, pages): neighbours in one piece."""


@attrs.frozen
class CopyDone:
    """Not an action but its answer: all that could be copied is."""

    id: int
    bad: tuple[int, ...] = ()
    """Source slots whose bytes did not arrive: unreadable, damaged, or not writable to where they should go."""


@attrs.frozen
class MoverOrder:
    """For the movers of a shard: one of the orders in :mod:`memserve.transfer.actions`."""

    order: object


Action = Send | Log | Stop | RunBatch | Deliver | Kill | Copy | MoverOrder
