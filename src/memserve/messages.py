"""Every message the actors exchange, and how it becomes bytes.

Read this file to know what the system can say; the calls to a shard are in :mod:`memserve.pool_messages`, the
messages of a transfer between shards in :mod:`memserve.transfer_messages`.

Frames on the wire: ``[sender identity (added by ZeroMQ), kind, body]``. ``kind`` is a version byte and the
class name, ``body`` is msgpack. Unknown body keys are ignored, so that a newer peer may add fields. An
unknown kind or another version is a :class:`~memserve.errors.PeerError`. Nothing is ever pickled.

Who says what::

    Frontend        -> GlobalScheduler  Submit, Cancel, Finished, Inquire
    GlobalScheduler -> Frontend         Planned, Rejected, Inquired
    GlobalScheduler -> worker           Prefill, Change; Cancel, passed on from a Frontend
    Frontend        -> worker           Cancel, Inquire, Change
    worker          -> Frontend         PromptScores, Tokens, Failed, Inquired
    prefill worker  -> decode worker    Handoff
    decode worker   -> prefill worker   HandoffTaken
    worker          -> MemPoolShard     Acquire, AllocMem, Insert, Adopt, FreeMem, Return, Load
    pool client     -> MemPoolShard     Acquire, AllocMem, Insert, Adopt, FreeMem, Match, Delete, Evict,
                                        SwapOut, SwapIn, Prefetch, DescribePool, Transfer, NextArrival, Meet
    MemPoolShard    -> its caller       Acquired, Allocated, Inserted, Adopted, Freed, PoolDescribed,
                                        Transferred, Arrival, PoolRefused
    MemPoolShard    -> MemPoolShard     Prefetch, Pull, PullRefused
    sending shard   -> receiving shard  TransferOffer, TransferSent, TransferWithdrawn
    receiving shard -> sending shard    TransferGranted, TransferArrived, TransferRefused, TransferStop
    MemPoolShard    -> GlobalScheduler  IndexDelta, IndexSnapshot
    GlobalScheduler -> MemPoolShard     IndexWanted, Prefetch
    every actor     -> GlobalScheduler  Load; Ended, from hosts without a scheduler
    GlobalScheduler -> every actor      Cluster, Gone, Refused

A *pool client* is a program that uses :mod:`memserve.client`.

Token fields are packed int32 (see :mod:`memserve.tokens`). All times are durations, ``_s`` in seconds and
``_ms`` in milliseconds, because hosts share no clock.
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
from memserve.scopes import tenant_of
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
    """One generation request, as one attempt carries it."""

    id: str
    attempt: int
    """Attempts count from 0; a higher attempt fences off the lower ones."""
    frontend: ActorId
    """The Frontend that receives the tokens."""
    scope: str
    """Root of the prefix index, derived from the API key, so that no tenant can see another's cache, and from
    the request's salt; see :mod:`memserve.scopes`."""
    tokens: bytes
    """The prompt and every token already sent."""
    prompt_tokens: int
    """Number of prompt tokens at the start of ``tokens``."""
    max_tokens: int
    """Limit of new tokens, over all attempts together."""
    stop_tokens: tuple[int, ...]
    """Token ids that end the stream; empty with ignore_eos."""
    sampling: Sampling
    priority: int = 0
    """Priority class while the request waits for a worker; lower goes first."""
    ttft_s: float | None = None
    """Deadline of the first token, in seconds after its Frontend received the request; None: no deadline."""

    @property
    def tenant(self) -> str:
        """The scope of its tenant."""
        return tenant_of(self.scope)

    @property
    def findable(self) -> bytes:
        """Tokens that a cache may match: none if prompt log probabilities are wanted, which KV lacks."""
        return self.tokens if self.sampling.prompt_logprobs is None else b""


@attrs.frozen
class Plan:
    """The scheduler's decision for one attempt. It travels along, so that no later actor has to ask."""

    prefill: ActorId
    decode: ActorId
    """The decode worker; equal to ``prefill`` when one worker does both and nothing is handed over."""
    shard: ActorId
    """The prefill worker's shard, where the prompt's pages are."""
    scheduler: ActorId
    decode_shard: ActorId = ActorId("")
    """The decode worker's shard if it differs from ``shard``: the pages move there. Empty: nothing moves."""
    source: ActorId = ActorId("")
    """A shard whose longer prefix match is worth fetching before the rest is computed. Empty: none."""
    source_tokens: int = 0
    """Prompt tokens that ``source`` is expected to hold."""
    expected_tokens: int = 0
    """Prompt tokens that ``shard`` is expected to hold. A smaller match shows a stale hint."""
    first_token_s: float = 0.0
    """Predicted seconds from placement to first token, for a request with a deadline; 0 otherwise."""


@attrs.frozen
class TokenUpdate:
    """New tokens of one request."""

    request: str
    attempt: int
    position: int
    """Index of the first of ``tokens`` in the whole sequence. A gap before it means a lost message."""
    tokens: bytes
    cached_tokens: int
    """Prompt tokens found in the pool."""
    finish: str | None = None
    """``stop`` or ``length`` on the last update; None before."""
    timings: Timings | None = None
    """Set together with ``finish``."""
    origins: Origins | None = None
    """Set together with ``finish``."""
    logprobs: Logprobs | msgspec.UnsetType = msgspec.UNSET
    """Log probabilities of the update's one token, if requested. Omitted from the encoded body otherwise."""


@attrs.frozen
class Member:
    """One running actor, as the cluster knows it."""

    id: ActorId
    kind: str
    """Frontend, GlobalScheduler, PrefillWorker, DecodeWorker or MemPoolShard."""
    endpoint: str
    """Address where the actor's inbox is bound."""
    pid: int
    state: str
    """``starting``, ``ready`` or ``draining``."""
    role: str = ""
    """Workers: prefill, decode or both."""
    shard: ActorId = ActorId("")
    """Workers: the id of the shard that they are attached to, once they are."""
    load: dict[str, float] = attrs.field(factory=dict)
    """Gauges and counters by metric name, with units in the names."""
    costs: StepCosts | None = None
    """Workers: what their steps cost, as measured when they started."""
    site: Site | None = None
    """Workers: the cores or the GPU that their steps run on. None: unknown, and treated as not shared."""
    role_by: str = ""
    """Workers: who changed the role at run time, ``hand`` or ``scheduler``; empty: it was not changed."""
    role_configured: str = ""
    """Workers: the role they started with."""
    role_wanted: str = ""
    """Workers, in a scheduler's view: the role that the worker was asked to take and has not taken yet."""
    joined: bool = False
    """Workers: whether `memserve join` brought the worker."""
    needs: tuple[ActorId, ...] = ()
    """Actors whose answer or announced death this actor needs, or something that it holds never ends."""
    host: str = ""
    """Address of the actor's host, in a cluster of several hosts."""


# ---- requests under way -------------------------------------------------------------------------------------


@attrs.frozen
class Submit:
    """Ask for a plan; repeated until answered by Planned, Rejected, or Inquired (the request waits)."""

    request: Request
    age_s: float = 0.0
    """Time since its Frontend received the request."""
    held: bool = False
    """A scheduler that is gone had queued the request: it must not be refused for lack of a place."""


@attrs.frozen
class Planned:
    """The plan of an attempt, sent to its Frontend."""

    request: str
    attempt: int
    plan: Plan


@attrs.frozen
class Finished:
    """A request has ended with its last token. Schedulers learn from it how long a tenant's answers are."""

    request: str
    tenant: str
    output_tokens: int


@attrs.frozen
class Rejected:
    """The scheduler refuses to place this attempt."""

    request: str
    attempt: int
    code: str
    message: str
    status: int
    retry_after_s: float | None = None


@attrs.frozen
class Prefill:
    """Run this request's prompt; then hand it over or keep it, as the plan says."""

    request: Request
    plan: Plan


@attrs.frozen
class Handoff:
    """A prefilled request and its lease, which always has an owner: the sender, until HandoffTaken."""

    request: Request
    plan: Plan
    lease: int
    pages: tuple[int, ...]
    generated: bytes
    """Tokens sampled so far; they were already sent to the Frontend."""
    retired_tokens: int
    """Tokens of the sequence whose pages are in the index, as the shard has acknowledged."""
    cached_tokens: int
    timings: Timings
    origins: Origins
    first_token_age_s: float
    """Seconds between the first token and the sending of this message."""
    sequel: bytes = b""
    """The tokens that followed this prompt the last time; see :class:`~memserve.pool_messages.Acquired`."""


@attrs.frozen
class HandoffTaken:
    """The decode worker's answer: it owns the lease now, or does not want it and the sender frees it."""

    request: str
    attempt: int
    adopted: bool


@attrs.frozen
class PromptScores:
    """Log probabilities of one chunk of the prompt. All of them are sent before the attempt's first token."""

    request: str
    attempt: int
    position: int
    """Index in the prompt of the first scored token. A gap before it means a lost message."""
    scores: PromptLogprobs


@attrs.frozen
class Tokens:
    """New tokens of one step for one Frontend."""

    updates: tuple[TokenUpdate, ...]


@attrs.frozen
class Failed:
    """This attempt has ended without its tokens. ``retry`` says that another attempt may succeed at once."""

    request: str
    attempt: int
    code: str
    message: str
    status: int
    retry: bool = False
    retry_after_s: float | None = None


@attrs.frozen
class Cancel:
    """The request is no longer wanted: drop every attempt up to this one and free its pages."""

    request: str
    attempt: int


@attrs.frozen
class Inquire:
    """Does the receiver hold this silent attempt? Answered by Inquired, or by a scheduler with Planned."""

    request: str
    attempt: int


@attrs.frozen
class Inquired:
    """Whether the sender holds this attempt. If no actor does, a message was lost: it is planned again."""

    request: str
    attempt: int
    held: bool


# ---- membership ---------------------------------------------------------------------------------------------


@attrs.frozen
class Load:
    """A heartbeat: registers the sender, renews its leases, and carries its state and metrics."""

    member: Member
    terms: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    """Settings that all hosts must share, as the sender's host has them; see
    :mod:`memserve.scheduling.terms`. Omitted in a cluster of one host."""


@attrs.frozen
class Cluster:
    """Every actor the scheduler knows. Only ``gone`` and Gone say that an actor is dead, not its absence."""

    scheduler: ActorId
    members: tuple[Member, ...]
    gone: tuple[ActorId, ...] = ()
    """Actors declared dead within the last minute, repeated for receivers that missed the Gone."""


@attrs.frozen
class Gone:
    """These actors are dead or fenced off; release whatever is held for them or depends on them."""

    actors: tuple[ActorId, ...]


@attrs.frozen
class Ended:
    """These actors' processes have ended, says their host's supervisor, which itself reaches no scheduler."""

    actors: tuple[ActorId, ...]


@attrs.frozen
class Refused:
    """The actor may not join: its host's settings differ, or an actor of another host has its name."""

    reason: str


@attrs.frozen
class Change:
    """The wanted state of a worker, see :mod:`memserve.scheduling.changes`. Only heartbeats answer it."""

    role: str = ""
    """``prefill``, ``decode`` or ``both``; ``auto``: the one it started with, until a scheduler asks for
    another; empty: unchanged."""
    drain: bool = False
    """Take no new request, finish or hand over those under way, then leave for good."""
    by: str = "hand"
    """``hand``: an operator wants it; ``scheduler``: the scheduler does, which yields to a role by hand."""


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
    """The message in two frames. Raises PeerError for an unknown kind or an undecodable body."""
    decoder = _decoders.get(kind)
    if decoder is None:
        raise PeerError(f"unknown message kind {kind[:64]!r}: this actor speaks version {PROTOCOL_VERSION}")
    try:
        message: Message = decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise PeerError(f"{kind[1:].decode()} does not decode: {error}") from error
    return message
