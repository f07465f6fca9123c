"""Every message the actors exchange, and how it becomes bytes. Read this file to know what the system can say; the calls to a
shard are in :mod:`memserve.pool_messages`.

Frames on the wire: ``[sender identity (added by ZeroMQ), kind, body]``. ``kind`` is the class name behind
a version byte, ``body`` its msgpack. Unknown body keys are ignored, so that a newer peer may add fields;
an unknown kind or another version is a :class:`~memserve.errors.PeerError`. Nothing is ever pickled.

Who says what::

    Frontend -> GlobalScheduler   Submit, Cancel, Finished, Inquire
    GlobalScheduler -> Frontend   Planned, Rejected, Inquired
    GlobalScheduler -> worker     Prefill, Change           worker -> Frontend            PromptTold, Tokens, Failed
    prefill worker -> decode      Handoff                   decode -> prefill worker      HandoffTaken
    Frontend -> worker            Cancel, Inquire, Change   worker -> Frontend            Inquired
    everyone -> GlobalScheduler   Load                      worker -> MemPoolShard        Load
    worker -> MemPoolShard        Acquire, AllocMem, Insert, Adopt, FreeMem
    MemPoolShard -> worker        Acquired, Allocated, Inserted, Adopted, Freed, PoolRefused
    any client -> MemPoolShard    those, Match, Delete, Evict, SwapOut, SwapIn, Prefetch, DescribePool
    worker -> MemPoolShard        Return                    MemPoolShard -> MemPoolShard  Prefetch, Pull, PullRefused
    MemPoolShard -> MemPoolShard  TransferOffer, TransferGranted, TransferSent, TransferArrived, TransferRefused,
                                  TransferStop, TransferWithdrawn
    MemPoolShard -> scheduler     IndexDelta, IndexSnapshot scheduler -> MemPoolShard     IndexWanted
    anyone -> GlobalScheduler     Ended                     GlobalScheduler -> everyone   Cluster, Gone, Refused

Token fields are packed int32 (see :mod:`memserve.tokens`). All times are durations, ``_s`` in seconds and ``_ms`` in
milliseconds: hosts share no clock.
"""

from __future__ import annotations

from typing import Any

import attrs
import msgspec

from memserve.accounts import Origins, Timings
from memserve.costs import Site, StepCosts
from memserve.drawing import Logprobs, PromptLogprobs, Sampling
from memserve.errors import PeerError
from memserve.identity import ActorId
from memserve.pool_messages import (
    Acquire,
    Acquired,
    Adopt,
    Adopted,
    Allocated,
    AllocMem,
    Arrival,
    Delete,
    DescribePool,
    Evict,
    Freed,
    FreeMem,
    IndexDelta,
    IndexSnapshot,
    IndexWanted,
    Insert,
    Inserted,
    Match,
    Meet,
    NextArrival,
    PoolDescribed,
    PoolRefused,
    Prefetch,
    Return,
    SwapIn,
    SwapOut,
    Transfer,
    Transferred,
)
from memserve.transfer_messages import (
    Pull,
    PullRefused,
    TransferArrived,
    TransferGranted,
    TransferOffer,
    TransferRefused,
    TransferSent,
    TransferStop,
    TransferWithdrawn,
)

PROTOCOL_VERSION = 1


# ---- values that travel inside messages ---------------------------------------------------------------------


@attrs.frozen
class Request:
    """One generation, as an attempt carries it."""

    id: str
    attempt: int
    """Counts from 0; a higher one fences off the lower ones."""
    frontend: ActorId
    """Where tokens go."""
    scope: str
    """Root of the prefix index, derived from the API key: one tenant cannot see another's cache."""
    tokens: bytes
    """The prompt and every token already sent."""
    prompt_tokens: int
    """How many of ``tokens`` are the prompt."""
    max_tokens: int
    """New tokens in all, over every attempt."""
    stop_tokens: tuple[int, ...]
    """Ids that end the stream; empty with ignore_eos."""
    sampling: Sampling
    priority: int = 0
    """Its class while it waits for a worker; lower is earlier."""
    ttft_s: float | None = None
    """By when its first token is wanted, in seconds from when its Frontend got it; None: whenever it comes."""

    @property
    def findable(self) -> bytes:
        """What of ``tokens`` may be found in a cache: nothing where the prompt's log probabilities are wanted, as KV has none."""
        return self.tokens if self.sampling.prompt_logprobs is None else b""


@attrs.frozen
class Plan:
    """What the scheduler decided for one attempt. It travels with the request: nobody downstream asks upstream."""

    prefill: ActorId
    decode: ActorId
    """Equal to ``prefill`` when one worker does both and nothing is handed over."""
    shard: ActorId
    """Where the prompt's pages are: the prefill worker's."""
    scheduler: ActorId
    decode_shard: ActorId = ActorId("")
    """The decode worker's, where it is another one: the pages move there. Empty: ``shard``, and nothing moves."""
    source: ActorId = ActorId("")
    """A shard that holds more of the prompt than ``shard``, worth fetching before the rest is computed. Empty: none."""
    source_tokens: int = 0
    """How many of the prompt's tokens ``source`` is expected to hold."""
    expected_tokens: int = 0
    """How many of them ``shard`` is expected to hold; what it really holds tells a stale hint."""
    first_token_s: float = 0.0
    """Predicted from the placement to the first token, where a deadline depends on it; 0: none does."""


@attrs.frozen
class TokenUpdate:
    """New tokens of one request."""

    request: str
    attempt: int
    position: int
    """Index in the whole sequence of the first of ``tokens``; a gap before it means that a message was lost."""
    tokens: bytes
    cached_tokens: int
    """Prompt tokens that were found in the pool."""
    finish: str | None = None
    """``stop`` or ``length`` on the last update."""
    timings: Timings | None = None
    """Set with ``finish``."""
    origins: Origins | None = None
    """Set with ``finish``."""
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET
    """Of its one token, where they were asked for. Left out of the bytes of all others."""


@attrs.frozen
class Member:
    """One running actor, as the cluster knows it."""

    id: ActorId
    kind: str
    """Frontend, GlobalScheduler, PrefillWorker, DecodeWorker or MemPoolShard."""
    endpoint: str
    """Where its inbox is bound."""
    pid: int
    state: str
    """``starting``, ``ready`` or ``draining``."""
    role: str = ""
    """Workers: prefill, decode or both."""
    shard: ActorId = ActorId("")
    """Workers: the id of the shard they are attached to, once they are."""
    load: dict[str, float] = attrs.field(factory=dict)
    """Gauges and counters by metric name, units in the names."""
    costs: StepCosts | None = None
    """Workers: what their steps cost, as measured at their start."""
    site: Site | None = None
    """Workers: whose cores, or which GPU, their steps run on. None: unknown, and shared with nobody."""
    role_by: str = ""
    """Workers: who gave it its role while it ran, ``hand`` or ``scheduler``; empty: its configuration did."""
    role_configured: str = ""
    """Workers: the role that it started with."""
    role_wanted: str = ""
    """Workers, in a scheduler's view: the role that it was asked to take and has not yet."""
    joined: bool = False
    """Workers: `memserve join` brought it."""
    needs: tuple[ActorId, ...] = ()
    """Without whose answer, or whose announced death, something that this actor holds never ends."""
    host: str = ""
    """The address of its host, in a cluster of several."""


# ---- requests on their way ----------------------------------------------------------------------------------


@attrs.frozen
class Submit:
    """A request that wants a plan. Answered by Planned, by Rejected, or by Inquired, which says that it waits; repeated until then."""

    request: Request
    age_s: float = 0.0
    """How long ago its Frontend got it."""
    held: bool = False
    """A scheduler that is gone had let it wait: it is not to be refused for lack of a place."""


@attrs.frozen
class Planned:
    """The plan for an attempt, told to its Frontend."""

    request: str
    attempt: int
    plan: Plan


@attrs.frozen
class Finished:
    """A request has ended with its last token: schedulers learn from it how long a tenant's answers are."""

    request: str
    scope: str
    output_tokens: int


@attrs.frozen
class Rejected:
    """The scheduler will not place this attempt."""

    request: str
    attempt: int
    code: str
    message: str
    status: int
    retry_after_s: float | None = None


@attrs.frozen
class Prefill:
    """Run this request's prompt; then hand it over, or keep it, as the plan says."""

    request: Request
    plan: Plan


@attrs.frozen
class Handoff:
    """A prefilled request with its lease. The sender keeps the lease until HandoffTaken, so that it is never nobody's."""

    request: Request
    plan: Plan
    lease: int
    pages: tuple[int, ...]
    generated: bytes
    """Tokens sampled so far, already sent to the Frontend."""
    retired_tokens: int
    """Tokens of the sequence of which the shard has said that their pages are in the index."""
    cached_tokens: int
    timings: Timings
    origins: Origins
    first_token_age_s: float
    """How long ago its first token came, when this was sent."""
    sequel: bytes = b""
    """What came after the prompt the last time; see :class:`~memserve.pool_messages.Acquired`."""


@attrs.frozen
class HandoffTaken:
    """The decode worker's answer: it owns the lease now, or it has no use for it and the sender frees it."""

    request: str
    attempt: int
    adopted: bool


@attrs.frozen
class PromptScores:
    """Log probabilities of a prompt's tokens, as a chunk of it was computed. All of them go before the attempt's first token."""

    request: str
    attempt: int
    position: int
    """Index in the prompt of the first of them; a gap before it means that a message was lost."""
    told: PromptLogprobs


@attrs.frozen
class Tokens:
    """One step's new tokens for one Frontend."""

    updates: tuple[TokenUpdate, ...]


@attrs.frozen
class Failed:
    """This attempt is over without its tokens. ``retry`` says that another attempt may succeed at once."""

    request: str
    attempt: int
    code: str
    message: str
    status: int
    retry: bool = False
    retry_after_s: float | None = None


@attrs.frozen
class Cancel:
    """Nobody wants this request any more: drop every attempt up to this one and free its pages."""

    request: str
    attempt: int


@attrs.frozen
class Inquire:
    """Nothing was heard of this attempt for a while: do you hold it? Answered by Inquired, or by a scheduler with Planned."""

    request: str
    attempt: int


@attrs.frozen
class Inquired:
    """Whether the sender holds this attempt. When nobody does, something was lost, and the Frontend plans it anew."""

    request: str
    attempt: int
    held: bool


# ---- membership ---------------------------------------------------------------------------------------------


@attrs.frozen
class Load:
    """A heartbeat: who I am and how busy. It registers, renews the sender's leases, and carries its metrics."""

    member: Member
    terms: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """What all hosts must agree on, as its host has it, see :mod:`memserve.scheduling.terms`. Left out on a cluster of one."""


@attrs.frozen
class Cluster:
    """Everyone the scheduler knows. Absence means nothing: only ``gone`` and Gone say that an actor is dead."""

    scheduler: ActorId
    members: tuple[Member, ...]
    gone: tuple[ActorId, ...] = ()
    """The dead of the last minute again, for whoever missed the Gone."""


@attrs.frozen
class Gone:
    """These actors are dead or fenced off; whoever holds something of theirs lets go of it."""

    actors: tuple[ActorId, ...]


@attrs.frozen
class Ended:
    """The processes of these actors have ended, by the word of their host's supervisor, which reaches no scheduler itself."""

    actors: tuple[ActorId, ...]


@attrs.frozen
class Refused:
    """The actor may not be part of this cluster: its host disagrees with the scheduler's, or its name is another's."""

    reason: str


@attrs.frozen
class Change:
    """What is wanted of a worker, see :mod:`memserve.scheduling.changes`. Nothing answers it: heartbeats show it."""

    role: str = ""
    """prefill, decode or both; ``auto``: the one it started with, until a scheduler says another; empty: as it is."""
    drain: bool = False
    """Take no new request, finish or hand over those under way, then leave for good."""
    by: str = "hand"
    """Who wants it: ``hand``, an operator; or ``scheduler``, which a role given by hand outweighs."""


# ---- codec --------------------------------------------------------------------------------------------------

Message = (
    Submit | Planned | Finished | Rejected | Prefill | Handoff | HandoffTaken | PromptScores | Tokens | Failed | Cancel
    | Inquire | Inquired
    | Acquire | Match | Acquired | AllocMem | Allocated | Insert | Inserted | Adopt | Adopted | FreeMem | Freed
    | Delete | Evict | SwapOut | SwapIn | Prefetch | DescribePool | PoolDescribed | PoolRefused
    | Pull | PullRefused | TransferOffer | TransferGranted | TransferSent | TransferArrived | TransferRefused
    | TransferStop | TransferWithdrawn | Return | Transfer | Transferred | NextArrival | Arrival | Meet
    | IndexDelta | IndexWanted | IndexSnapshot | Load | Cluster | Gone | Ended | Refused | Change
)  # fmt: skip

_encode = msgspec.msgpack.Encoder().encode
_kinds: dict[type[Any], bytes] = {
    kind: bytes([PROTOCOL_VERSION]) + kind.__name__.encode() for kind in Message.__args__
}
_decoders = {frame: msgspec.msgpack.Decoder(kind) for kind, frame in _kinds.items()}


def encode(message: Message) -> tuple[bytes, bytes]:
    """The kind frame and the body frame of a message."""
    return _kinds[type(message)], _encode(message)


def decode(kind: bytes, body: bytes) -> Message:
    """The message in two frames. Raises PeerError when it is not one of ours."""
    decoder = _decoders.get(kind)
    if decoder is None:
        raise PeerError(f"unknown message kind {kind[:64]!r}: this actor speaks version {PROTOCOL_VERSION}")
    try:
        message: Message = decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise PeerError(f"{kind[1:].decode()} does not decode: {error}") from error
    return message
