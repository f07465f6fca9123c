"""The core of a worker by itself: which requests it accepts, which it fails, and the order of its messages."""

from __future__ import annotations

import pytest

from memserve.actions import Send
from memserve.drawing import Sampling
from memserve.engine.batching import BatchLimits, WorkerSettings
from memserve.engine.outbox import Outbox
from memserve.engine.sequence import Phase, Sequence
from memserve.engine.worker import WorkerCore
from memserve.errors import PoolError
from memserve.identity import ActorId
from memserve.messages import Failed, Handoff, Member, Plan, Prefill, Request, Tokens
from memserve.pool_messages import Acquire, PoolRefused
from memserve.presence import Presence, seed_id
from memserve.tokens import pack

ME, SHARD, FRONTEND, OTHER = (ActorId(f"{name}.1") for name in ("w0", "s0", "frontend-0", "d0"))
SCHEDULER = ActorId("scheduler-0.1")


def worker(requests_max: int = 2) -> WorkerCore:
    """A worker that prefills and decodes."""
    presence = Presence(
        Member(ME, "PrefillWorker", "ipc://w", 1, "ready", "both", SHARD), (seed_id("scheduler-0"),)
    )
    settings = WorkerSettings(BatchLimits(64, 8), 16, 1000, "all", requests_max=requests_max)
    return WorkerCore(presence, SHARD, settings)


def request(name: str, attempt: int = 0) -> Request:
    """A request with a prompt of ten tokens that wants five more."""
    return Request(name, attempt, FRONTEND, "", pack(range(10)), 10, 5, (), Sampling())


def prefill(core: WorkerCore, name: str, attempt: int = 0) -> None:
    """Have the scheduler place a request on the worker."""
    core.receive(SCHEDULER, Prefill(request(name, attempt), Plan(ME, ME, SHARD, SCHEDULER)), 0.0)


def sent(core: WorkerCore, kind: type) -> list:
    """The messages of one type that the core sends."""
    core.check()
    return [one.message for one in core.take() if isinstance(one, Send) and isinstance(one.message, kind)]


def test_a_full_worker_refuses_what_has_not_begun() -> None:
    """A worker at its limit refuses a first attempt with status 429, as the Frontend does, but accepts a resumed request."""
    core = worker(requests_max=2)
    for name in ("a", "b", "c"):
        prefill(core, name)
    (failed,) = sent(core, Failed)
    assert (failed.request, failed.code, failed.status, failed.retry) == ("c", "overloaded", 429, False)
    prefill(core, "d", attempt=1)
    assert sent(core, Failed) == []


@pytest.mark.parametrize(
    ("code", "attempt", "status", "retry"),
    [
        (PoolError.QUEUE_FULL, 0, 503, False),
        (PoolError.QUEUE_FULL, 1, 503, True),
        (PoolError.UNKNOWN_LEASE, 2, 503, True),
        (PoolError.TOO_LARGE, 1, 400, False),
    ],
)
def test_pages_that_are_refused_end_what_has_not_begun(
    code: str, attempt: int, status: int, retry: bool
) -> None:
    """When the shard refuses pages, only a resumed request (attempt 1 or later) is tried again, unless it can never fit."""
    core = worker()
    prefill(core, "a", attempt)
    (acquire,) = sent(core, Acquire)
    core.receive(SHARD, PoolRefused(acquire.call, code, "no"), 0.1)
    (failed,) = sent(core, Failed)
    assert (failed.code, failed.status, failed.retry) == (code, status, retry)


def test_the_first_token_leaves_before_the_sequence() -> None:
    """The outbox sends a request's first token before its handoff, so that the decode worker's tokens do not overtake it."""
    outbox = Outbox()
    one = Sequence(request("r"), Plan(ME, OTHER, SHARD, SCHEDULER), pack(range(11)), Phase.LEAVING, 0.0, 0)
    one.token_at = 0.0
    outbox.send(OTHER, one.handoff(0.1))
    outbox.update(FRONTEND, one.update(10))
    assert [type(action.message) for action in outbox.take()] == [Tokens, Handoff]
