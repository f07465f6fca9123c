"""Messages to and from a MemPoolShard: the paper's pool calls, their answers, and the events of its index.

A call is identified by its sender and ``call``, a number that the sender never reuses: a repeated call gets
the same answer. A *slot* names a page by tier and page number in one integer; an *address* also names the
shard and its incarnation (both are defined in :mod:`memserve.mempool.addresses`).
"""

from __future__ import annotations

import attrs

from memserve.identity import ActorId

# ---- pool calls --------------------------------------------------------------------------------------------


@attrs.frozen
class Source:
    """Another shard, from which pages missing here are fetched before a call is answered."""

    shard: ActorId
    tokens: int
    """Tokens from position 0 that it is expected to hold; with ``lease``, the last page may be partial."""
    deadline_s: float
    """Seconds until the call is answered anyway: a failed fetch costs a recompute, never the request."""
    lease: int = 0
    """The other shard's lease of ``owner`` to take pages from, full or not; 0 takes what the index holds."""
    owner: ActorId = ActorId("")
    insert: bool = True
    """Whether whole pages that arrive are inserted into the index here."""
    request: str = ""
    """Request that the tokens belong to.

    It is logged, and a handoff of the request waits for the prefetch under way for it.
    """
    tries: int = 1
    """How often a Prefetch may try to fetch the pages."""
    ahead: bool = False
    """Whether a Prefetch serves a request that will be handed over to this shard after its prompt."""


@attrs.frozen
class Acquire:
    """match + pin + alloc_mem: pages for all of ``tokens`` plus ``extra_pages`` more, cached pages first.

    Answered by Acquired (possibly later, when pages come free or are brought in) or PoolRefused. A FreeMem
    with the same ``call`` and ``lease=0`` withdraws it.
    """

    call: int
    scope: str
    tokens: bytes
    extra_pages: int
    source: Source | None = None
    swap_least: int = 0
    """Fewest cached tokens that are worth bringing in from slower tiers.

    Cached pages there are brought in only if they, and the cached pages behind them, hold at least this many
    tokens. Computing fewer is faster.
    """
    uncached: bool = False
    """Whether all of ``tokens`` must be computed: nothing is matched, and every page is new."""
    sequel_tokens: int = 0
    """How many tokens are wanted of what followed ``tokens`` when they were last in the index."""


@attrs.frozen
class Match:
    """The longest cached prefix of ``tokens``, pinned by a lease. Answered and withdrawn like an Acquire."""

    call: int
    scope: str
    tokens: bytes


@attrs.frozen
class Acquired:
    """A lease. Page ``pages[i]`` holds the tokens from ``i * page_tokens`` on.

    The first ``cached_tokens`` tokens are filled. Pages are slots: tier and page number (see
    :mod:`memserve.mempool.addresses`). A device page's slot equals its page number.
    """

    call: int
    lease: int
    pages: tuple[int, ...]
    cached_tokens: int
    fetched_tokens: int = 0
    """How many tokens after the cached ones are filled too: fetched from another shard, not retired yet."""
    fetched_bytes: int = 0
    """Bytes moved to this shard for the call, those moved ahead of it included."""
    found_pages: tuple[int, ...] = (0, 0, 0)
    """Number of cached pages by the tier in which they were found."""
    sequel: bytes = b""
    """Packed tokens that last followed the call's: those in the index, at most ``sequel_tokens``."""


@attrs.frozen
class AllocMem:
    """``pages`` more pages at the end of a lease's table, all or nothing.

    Answered by Allocated. With ``lease=0`` the pages get a new lease, and the answer is Acquired. Withdrawn
    like an Acquire.
    """

    call: int
    lease: int
    pages: int
    tier: int = 0
    """0 for device, 1 for host."""
    scope: str = ""
    """Scope of a new lease: the one under which its pages will be inserted."""


@attrs.frozen
class Allocated:
    """The pages added to the lease, as slots."""

    call: int
    lease: int
    pages: tuple[int, ...]


@attrs.frozen
class Insert:
    """Retire whole pages of a lease into the index.

    ``tokens`` begin at position ``start``, which must not lie beyond the tokens that are retired already.
    """

    call: int
    lease: int
    start: int
    tokens: bytes
    addresses: tuple[int, ...] = ()
    """Pages that hold the tokens, if they are not the next of the lease's table.

    The first of them may be cached pages.
    """


@attrs.frozen
class Inserted:
    """How many of the inserted tokens the index already had."""

    call: int
    already_tokens: int


@attrs.frozen
class Adopt:
    """The sender takes over a lease that was handed to it."""

    call: int
    lease: int
    previous: ActorId


@attrs.frozen
class Adopted:
    """The lease now belongs to the sender of the Adopt."""

    call: int


@attrs.frozen
class FreeMem:
    """End a lease: unpin its indexed pages and free the others. With ``lease=0``, withdraw the call ``call``.

    If ``call`` is set, the answer is Freed or, for a lease, PoolRefused. Otherwise there is no answer.
    """

    lease: int
    call: int = 0
    addresses: tuple[int, ...] = ()
    """If set, only these pages are freed, none of them retired. Naming all pages of the lease ends it."""


@attrs.frozen
class Delete:
    """Drop a prompt and everything that continues it from the index. Answered by Freed."""

    call: int
    scope: str
    tokens: bytes


@attrs.frozen
class Evict:
    """Drop up to ``pages`` unpinned pages of a tier, least recently used first. Answered by Freed."""

    call: int
    pages: int
    tier: int = 0


@attrs.frozen
class SwapOut:
    """Move up to ``pages`` unpinned pages of a tier to the next tier, least recently used first.

    Answered by Freed once they are moved.
    """

    call: int
    pages: int
    tier: int = 0


@attrs.frozen
class SwapIn:
    """Bring the indexed pages of a lease into the device tier.

    Answered by Acquired, with their new slots, once they are there.
    """

    call: int
    lease: int


@attrs.frozen
class Prefetch:
    """A hint that this prefix will be acquired soon: bring it in if there is room. Never answered."""

    scope: str
    tokens: bytes
    source: Source | None = None
    """Where to fetch the pages that no tier here holds."""


@attrs.frozen
class Return:
    """Let the shard ``to`` fetch, in the background, what it is missing of this prefix.

    Sent when a request has ended or will be handed over; never answered. The receiving shard sends ``to`` a
    Prefetch that names itself as the source. The sender's inserts were sent earlier, so they are in the index
    by then.
    """

    scope: str
    tokens: bytes
    to: ActorId
    deadline_s: float
    request: str = ""
    """Request that the prefix belongs to; it becomes the request of the Prefetch's source."""
    ahead: bool = False
    """Whether the request will be handed over; otherwise it has ended."""


PRIVATE_BYTES_MAX = 1 << 20
"""Maximum size of a Transfer's private data.

A message above the bus's limit would cut the connection that all others use too.
"""


@attrs.frozen
class Transfer:
    """Copy pages to another shard. Answered by Transferred once they are there; withdrawn like an Acquire.

    With ``tokens``, the receiver inserts them before it acknowledges: the paper's ``transfer_with_insert``.
    """

    call: int
    to: ActorId
    scope: str
    leases: tuple[int, ...]
    """Leases of the sender that hold the pages."""
    addresses: tuple[int, ...]
    deadline_s: float
    tokens: bytes = b""
    """Tokens of whole pages from position 0, as many pages as are sent; empty inserts nothing."""
    destination: tuple[int, ...] = ()
    """Addresses at the receiver; if empty, the receiver allocates pages."""
    into: int = 0
    """Lease of ``owner`` at the receiver that holds ``destination``."""
    owner: ActorId = ActorId("")
    """Owner of the pages at the receiver; if empty, the sender.

    Pages that the receiver allocates must be claimed by the owner, with a NextArrival or an Adopt.
    """
    private: bytes = b""
    """Data that the owner gets with the pages, at most PRIVATE_BYTES_MAX bytes."""
    granularity: str = ""
    """A value of Granularity; if empty, the shard's own setting."""


@attrs.frozen
class Transferred:
    """The pages are at the receiver, under this lease."""

    call: int
    lease: int
    pages: tuple[int, ...]
    """Slots at the receiver."""
    nbytes: int


@attrs.frozen
class NextArrival:
    """Ask for pages that another actor has sent to the sender of this call.

    Answered by Arrival, at once or when some arrive. Withdrawn like an Acquire.
    """

    call: int


@attrs.frozen
class Arrival:
    """Pages that another actor's Transfer has brought for the asker, under a lease that the asker owns."""

    call: int
    lease: int
    pages: tuple[int, ...]
    cached_tokens: int
    """How many tokens, from the first on, are in the index."""
    sender: ActorId
    """Actor whose Transfer sent them."""
    private: bytes


@attrs.frozen
class Meet:
    """Introduce another shard, to which this client may ask the shard to send pages. Never answered."""

    shard: ActorId
    endpoint: str


@attrs.frozen
class Freed:
    """How many pages came free."""

    call: int
    pages: int


@attrs.frozen
class DescribePool:
    """Ask for what a client must know before it uses a shard. Answered by PoolDescribed."""

    call: int


@attrs.frozen
class PoolDescribed:
    """A shard's number and incarnation, its sizes, and where its memory can be mapped.

    The number and the incarnation are part of the shard's addresses.
    """

    call: int
    shard: int
    incarnation: int
    page_tokens: int
    page_bytes: int
    pages: tuple[int, ...]
    """Number of pages by tier."""
    arenas: tuple[str, ...]
    """By tier, the socket that hands out the arena on the shard's host; empty if it cannot be mapped."""
    actor: ActorId = ActorId("")
    """Name by which other shards know this one."""
    lease_s: float = 10.0
    """How long a caller may be silent before it loses its leases."""


@attrs.frozen
class PoolRefused:
    """A pool call that was refused and changed nothing.

    ``code`` says why; it is a code of :class:`~memserve.errors.PoolError`.
    """

    call: int
    code: str
    message: str


# ---- index events for schedulers --------------------------------------------------------------------------


@attrs.frozen
class IndexEvent:
    """One change of a shard's prefix index.

    An *entry* is a run of whole pages in one tier that continues another entry. A copy of the index needs
    only the end of each entry. ``stored`` appends tokens to the end of ``parent`` or, for an entry that is
    already known, to the entry's own end. ``split`` leaves the entry's end where it is and moves its first
    ``pages`` pages to the new entry ``parent``. ``moved`` changes the tier of all its pages. ``removed``
    drops it.
    """

    kind: str
    """``stored``, ``split``, ``moved`` or ``removed``."""
    entry: int
    """Number of the entry, counted from 1 in each incarnation of a shard."""
    parent: int = 0
    """For ``stored``, the entry that it continues, or 0 for the root of ``scope``.

    For ``split``, the new entry that gets the front.
    """
    scope: str = ""
    """For ``stored`` below a root, the scope of the prefix."""
    tokens: bytes = b""
    """For ``stored``, the tokens of whole pages."""
    tier: int = 0
    """For ``stored`` and ``moved``: 0 device, 1 host, 2 disk."""
    pages: int = 0
    """For ``split``, the number of pages in the front."""


@attrs.frozen
class IndexDelta:
    """Changes of a shard's index, in order.

    A scheduler for which ``first`` is not the number it expected asks for a snapshot. Events are numbered
    from 0 in each incarnation of a shard. An empty delta reports the position of a shard that has been quiet.
    """

    first: int
    events: tuple[IndexEvent, ...] = ()


@attrs.frozen
class IndexWanted:
    """A scheduler that is new, or has missed events, asks for the whole index."""

    expected: int
    """Number of the event that the scheduler waited for; 0 if it is new."""


@attrs.frozen
class IndexSnapshot:
    """One part of a shard's whole index as ``stored`` events.

    The snapshot is valid once all ``parts`` have arrived, in order.
    """

    next: int
    """Number of the first event in the delta that follows."""
    part: int
    """Number of this part, from 0."""
    parts: int
    events: tuple[IndexEvent, ...]
