"""What a core asks its shell to do, as values. Cores never act themselves: ``take()`` returns these."""

from __future__ import annotations

import attrs

from memserve.drawing import Logprobs, PromptLogprobs
from memserve.engine.plans import BatchPlan, BatchResult
from memserve.errors import RequestFailed
from memserve.identity import ActorId
from memserve.messages import Message


@attrs.frozen
class Send:
    """Send ``message`` to ``to``. Sending may fail (peer gone, queue full); cores repeat what must arrive."""

    to: ActorId
    message: Message
    last: bool = False
    """Nothing else will be sent to this incarnation: its connection is closed behind the message."""


@attrs.frozen
class Log:
    """Write one structured line. ``event`` is a stable name; ``data`` has units in its keys."""

    level: str
    event: str
    data: dict[str, object] = attrs.field(factory=dict)


@attrs.frozen
class Deliver:
    """New tokens, the end (``finish``) or the failure of ``request``, for its client."""

    request: str
    tokens: tuple[int, ...]
    finish: str | None
    cached_tokens: int
    failure: RequestFailed | None = None
    logprobs: tuple[Logprobs, ...] = ()
    """Log probabilities, one for each token, if requested."""
    prompt: tuple[PromptLogprobs, ...] = ()
    """Newly arrived log probabilities of the prompt's tokens, if requested."""


@attrs.frozen
class Stop:
    """Exit, as this actor cannot continue (fenced off, or its shard is gone): a successor starts clean."""

    reason: str


@attrs.frozen
class RunBatch:
    """Run one step; its result comes back to the core as :class:`BatchDone`."""

    plan: BatchPlan


@attrs.frozen
class BatchDone:
    """Not an action but the answer to RunBatch: the step has ended."""

    result: BatchResult


@attrs.frozen
class Died:
    """From the supervisor: a process has ended. The scheduler need not wait until it counts as silent."""

    actor: ActorId


@attrs.frozen
class Overslept:
    """From this actor's own clock: it was stopped, and has not heard what others sent in that time."""


@attrs.frozen
class Kill:
    """End a process that was declared dead but may only be stopped.

    It must end before pages that it could still write to are granted again.
    """

    actor: ActorId
    pid: int


@attrs.frozen
class Copy:
    """Copy pages between a shard's tiers. The end always comes back to the core, as :class:`CopyDone`."""

    id: int
    runs: tuple[tuple[int, int, int], ...]
    """Runs of neighbouring pages: (first source slot, first target slot, number of pages)."""


@attrs.frozen
class CopyDone:
    """Not an action but the answer to Copy: everything that could be copied has been."""

    id: int
    bad: tuple[int, ...] = ()
    """Source slots whose bytes did not arrive: unreadable, damaged, or not writable at the target."""


@attrs.frozen
class MoverOrder:
    """An order for the shard's movers, one of those in :mod:`memserve.transfer.actions`."""

    order: object


Action = Send | Log | Stop | RunBatch | Deliver | Kill | Copy | MoverOrder
