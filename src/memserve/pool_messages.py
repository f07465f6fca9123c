"""The messages to and from a MemPoolShard: the paper's calls, their answers, and what its index holds.

A call is known by its sender and ``call``, a number that the sender never uses twice: a repeat gets the same answer.
Pages are *slots*, tier and page number in one integer; *addresses* name the shard and its incarnation too (both in
:mod:`memserve.mempool.addresses`).
"""

from __future__ import annotations

import attrs

from memserve.identity import ActorId

# ---- pool calls ---------------------------------------------------------------------------------------------


@attrs.frozen
class Source:
    """Another shard, from which pages that are missing here are to be fetched before a call is answered."""

    shard: ActorId
    tokens: int
    """Tokens from position 0 that it is expected to hold, the last page perhaps in part where ``lease`` says so."""
    deadline_s: float
    """After so long the call is answered without them: a fetch that fails costs a recompute, never the request."""
    lease: int = 0
    """There: take the pages of this lease of ``owner``, full or not. 0: what the index holds."""
    owner: ActorId = ActorId("")
    insert: bool = True
    """Whether whole pages that arrive go into the index here."""
    request: str = ""
    """Whose tokens they are, for the log."""
    tries: int = 1
    """Of a Prefetch: how often it may be begun."""
    ahead: bool = False
    """Of a Prefetch: the request will be handed over to here when its prompt is computed."""


@attrs.frozen
class Acquire:
    """match + pin + alloc_mem: pages for all of ``tokens`` and ``extra_pages`` more, cached ones first.

    Answered by Acquired (perhaps later, when pages come free or are brought in) or PoolRefused. FreeMem with the same
    ``call`` and ``lease=0`` withdraws it.
    """

    call: int
    scope: str
    tokens: bytes
    extra_pages: int
    source: Source | None = None
    swap_least: int = 0
    """Cached pages of slower tiers are brought in only if they, and what is cached behind them, hold so many tokens;
    fewer are computed sooner."""
    anew: bool = False
    """All of ``tokens`` are to be computed: nothing is matched, and every page is a new one."""
    sequel_tokens: int = 0
    """So many tokens are wanted of what came after ``tokens`` before."""


@attrs.frozen
class Match:
    """The longest cached prefix of ``tokens``, pinned by a lease on its pages. Answered and withdrawn as an Acquire."""

    call: int
    scope: str
    tokens: bytes


@attrs.frozen
class Acquired:
    """A lease. ``pages[i]`` holds tokens ``i * page_tokens`` onwards; the first ``cached_tokens`` are filled.

    Pages are slots: tier and page number (see :mod:`memserve.mempool.addresses`). A device page's slot is its number.
    """

    call: int
    lease: int
    pages: tuple[int, ...]
    cached_tokens: int
    fetched_tokens: int = 0
    """So many tokens more are filled too: they came from another shard, and are not retired yet."""
    fetched_bytes: int = 0
    """Moved to this shard for the call."""
    found_pages: tuple[int, ...] = (0, 0, 0)
    """The cached ones, by the tier in which they were found."""
    sequel: bytes = b""
    """What came after the call's tokens the last time, packed, as far as that is in the index and was wanted."""


@attrs.frozen
class AllocMem:
    """``pages`` more pages at the end of a lease's table, all or nothing: Allocated. Of ``lease=0``, a new one: Acquired."""

    call: int
    lease: int
    pages: int
    tier: int = 0
    """0 device, 1 host."""
    scope: str = ""
    """Of a new lease: whose prefixes it will be inserted into."""


@attrs.frozen
class Allocated:
    """The pages added to the lease, as slots."""

    call: int
    lease: int
    pages: tuple[int, ...]


@attrs.frozen
class Insert:
    """Retire whole pages of a lease into the index: ``tokens`` follow the ``start`` tokens retired before."""

    call: int
    lease: int
    start: int
    tokens: bytes
    addresses: tuple[int, ...] = ()
    """The pages that hold them, where they are not the next of the table; may begin with cached ones."""


@attrs.frozen
class Inserted:
    """How many of the inserted tokens the index already had, in other pages."""

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
    """The lease is the sender's now."""

    call: int
    lease: int


@attrs.frozen
class FreeMem:
    """End a lease: unpin what is indexed, free the rest. With ``lease=0``, withdraw the call ``call``.

    With ``call`` it is answered by Freed or, for a lease, PoolRefused; without by nothing.
    """

    lease: int
    call: int = 0
    addresses: tuple[int, ...] = ()
    """Only these of its pages, none of them retired; all of them end the lease."""


@attrs.frozen
class Delete:
    """Drop a prompt, and all that continues it, from the index: Freed."""

    call: int
    scope: str
    tokens: bytes


@attrs.frozen
class Evict:
    """Drop up to ``pages`` unpinned pages of a tier, the least recently used: Freed."""

    call: int
    pages: int
    tier: int = 0


@attrs.frozen
class SwapOut:
    """Move up to ``pages`` unpinned pages of a tier, the least recently used, to the next tier: Freed, when it is done."""

    call: int
    pages: int
    tier: int = 0


@attrs.frozen
class SwapIn:
    """Bring the indexed pages of a lease into the device tier: Acquired, with their new slots, when it is done."""

    call: int
    lease: int


@attrs.frozen
class Prefetch:
    """A hint: this prefix will be acquired soon, so bring it in if there is room. Never answered."""

    scope: str
    tokens: bytes
    source: Source | None = None
    """Where to fetch what no tier here holds."""


@attrs.frozen
class Return:
    """A request has ended, or will be handed over: let the shard ``to`` have what it lacks of this prefix, in the background.

    Never answered. It is told by a Prefetch that names this shard as its source, after the sender's inserts, which came before.
    """

    scope: str
    tokens: bytes
    to: ActorId
    deadline_s: float
    request: str = ""
    """For the log."""
    ahead: bool = False
    """It will be handed over."""


@attrs.frozen
class Transfer:
    """Copy pages to another shard: Transferred when they are there. Withdrawn as an Acquire.

    With ``tokens`` the receiver inserts them before it acknowledges: the paper's ``transfer_with_insert``.
    """

    call: int
    to: ActorId
    scope: str
    leases: tuple[int, ...]
    """Of the sender's, which hold the pages."""
    addresses: tuple[int, ...]
    deadline_s: float
    tokens: bytes = b""
    """Whole pages from position 0; as many as there are pages."""
    destination: tuple[int, ...] = ()
    """Addresses there; none: the receiver allocates."""
    into: int = 0
    """The lease there, of ``owner``'s, that has them."""
    owner: ActorId = ActorId("")
    """Whose the pages are there; nobody: the sender's. It claims what was allocated by a NextArrival or an Adopt."""
    private: bytes = b""
    """For the owner, with the pages."""
    granularity: str = ""
    """Of the values of Granularity; empty: what the shard is set to."""


@attrs.frozen
class Transferred:
    """The pages are there, under this lease."""

    call: int
    lease: int
    pages: tuple[int, ...]
    """Slots of the receiver's."""
    nbytes: int


@attrs.frozen
class NextArrival:
    """What has another sent to me? Arrival, now or when something comes. Withdrawn as an Acquire."""

    call: int


@attrs.frozen
class Arrival:
    """Pages that another's Transfer has brought for the asker, under a lease of its own."""

    call: int
    lease: int
    pages: tuple[int, ...]
    cached_tokens: int
    """The first of them are inserted."""
    shard: ActorId
    """Where they come from."""
    sender: ActorId
    """Whose call it was."""
    private: bytes


@attrs.frozen
class Meet:
    """From a client to a shard: another shard, to which it may be told to send pages. Never answered."""

    shard: ActorId
    endpoint: str


@attrs.frozen
class Freed:
    """How many pages came free."""

    call: int
    pages: int


@attrs.frozen
class DescribePool:
    """What a client must know before it uses a shard: PoolDescribed."""

    call: int


@attrs.frozen
class PoolDescribed:
    """A shard's number and incarnation, which are in its addresses; its sizes; and where its memory can be mapped."""

    call: int
    shard: int
    incarnation: int
    page_tokens: int
    page_bytes: int
    pages: tuple[int, ...]
    """By tier."""
    arenas: tuple[str, ...]
    """By tier: the socket that hands out its arena on the shard's host; empty for one that cannot be mapped."""
    actor: ActorId = ActorId("")
    """By which name other shards know it."""
    lease_s: float = 10.0
    """How long a caller may be silent before it loses its leases."""


@attrs.frozen
class PoolRefused:
    """A pool call that changed nothing, and why (a code of :class:`~memserve.errors.PoolError`)."""

    call: int
    code: str
    message: str


# ---- the index, told to schedulers -------------------------------------------------------------------------


@attrs.frozen
class IndexEvent:
    """One change of a shard's prefix index. An *entry* is a run of whole pages of one tier that continues another entry.

    Whoever keeps a copy needs each entry's end only: ``stored`` puts tokens behind the end of ``parent`` (or, for an
    entry that it knows, behind the entry's own), ``split`` leaves the end where it is and gives the first ``pages``
    pages to the new entry ``parent``, ``moved`` changes the tier of all its pages, ``removed`` drops it.
    """

    kind: str
    """``stored``, ``split``, ``moved`` or ``removed``."""
    entry: int
    """Counts from 1 in each incarnation of a shard."""
    parent: int = 0
    """Stored: the entry that it continues; 0 is the root of ``scope``. Split: the entry that gets the front."""
    scope: str = ""
    """Stored, below a root: whose prefix it is."""
    tokens: bytes = b""
    """Stored: whole pages of tokens."""
    tier: int = 0
    """Stored and moved: 0 device, 1 host, 2 disk."""
    pages: int = 0
    """Split: pages of the front."""


@attrs.frozen
class IndexDelta:
    """Changes of a shard's index, in order. ``first`` must be the number that was expected: a gap asks for a snapshot.

    Events count from 0 in each incarnation of a shard. An empty one says how far a shard is that has been quiet.
    """

    first: int
    events: tuple[IndexEvent, ...] = ()


@attrs.frozen
class IndexWanted:
    """A scheduler has missed something, or is new: send the whole index."""

    expected: int
    """The number of the event that it waited for; 0 for a new one."""


@attrs.frozen
class IndexSnapshot:
    """A part of a shard's whole index as ``stored`` events; valid once all ``parts`` have come, in order."""

    next: int
    """The delta that follows it begins here."""
    part: int
    """From 0."""
    parts: int
    events: tuple[IndexEvent, ...]
