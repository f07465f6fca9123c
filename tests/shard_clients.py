"""A shard's core with simulated memory, and clients that make random calls and die at random."""

from __future__ import annotations

import random
from collections.abc import Callable

import attrs

from index_mirror import Mirror
from memserve.actions import Copy, CopyDone, Kill, Send
from memserve.identity import ActorId
from memserve.mempool.addresses import Home, Tier, tier_of
from memserve.mempool.pool import Pool
from memserve.mempool.room import Capacity
from memserve.mempool.shard import ShardCore
from memserve.messages import Gone, Load, Member
from memserve.pool_messages import (
    Acquire,
    Acquired,
    Adopt,
    Allocated,
    AllocMem,
    Arrival,
    Delete,
    Evict,
    FreeMem,
    IndexDelta,
    IndexSnapshot,
    IndexWanted,
    Insert,
    Match,
    NextArrival,
    PoolRefused,
    Prefetch,
    SwapIn,
    SwapOut,
    Transfer,
)
from memserve.tokens import TOKEN_BYTES, count, pack, span

PAGE = 4
MAY_WAIT = Acquire | Match | Transfer | NextArrival
SCHEDULER = ActorId("scheduler-0.seed")


@attrs.define(eq=False)
class Held:
    """A lease as its owner knows it; ``tokens``: those whose KV is in the pages."""

    scope: str
    tokens: bytes
    pages: tuple[int, ...]
    retired: int


@attrs.define(eq=False)
class Client:
    """One incarnation of an owner of leases."""

    id: ActorId
    call: int = 0
    asked: dict[int, tuple[Callable[[object], None], object]] = attrs.field(factory=dict)
    leases: dict[int, Held] = attrs.field(factory=dict)


@attrs.define
class World:
    """A shard and its clients, driven by one seed. Copies end late and out of order; some disk pages rot."""

    seed: int
    capacity: Capacity
    rng: random.Random = attrs.field(init=False)
    core: ShardCore = attrs.field(init=False)
    now: float = 0.0
    clients: dict[str, Client] = attrs.field(factory=dict)
    memory: dict[int, tuple[str, bytes] | None] = attrs.field(factory=dict)
    copies: list[Copy] = attrs.field(factory=list)
    mirror: Mirror = attrs.field(factory=lambda: Mirror(PAGE * TOKEN_BYTES))
    lost_messages: bool = False
    seen: dict[str, int] = attrs.field(factory=dict)
    prompts: list[bytes] = attrs.field(factory=list)
    incarnations: int = 0

    def __attrs_post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.core = self.make_core()
        trunks = [[self.rng.randrange(3) for _ in range(20)] for _ in range(3)]
        for _ in range(12):
            trunk = self.rng.choice(trunks)[: self.rng.randrange(20)]
            self.prompts.append(
                pack([*trunk, *(self.rng.randrange(3) for _ in range(self.rng.randrange(1, 16)))])
            )
        for name in ("a", "b", "c"):
            self.born(name)

    def make_core(self) -> ShardCore:
        """The shard's core."""
        pool = Pool(self.capacity, PAGE, 5.0, home=Home(1, self.seed))
        return ShardCore(pool, waiting_max=6, remembered_max=50, schedulers=(SCHEDULER,))

    # ---- the world -----------------------------------------------------------------------------------------

    def born(self, name: str) -> None:
        """Start a new incarnation of an owner; answers to the old one are lost."""
        self.incarnations += 1
        self.clients[name] = Client(ActorId(f"{name}.{self.incarnations}"))

    def say(self, sender: ActorId, message: object) -> None:
        """Give the core a message and perform its actions."""
        self.core.receive(sender, message, self.now)
        self.act()

    def act(self) -> None:
        """Perform the core's actions in order, then check its invariants."""
        while actions := self.core.take():
            for action in actions:
                self.perform(action)
        self.core.check()

    def perform(self, action: object) -> None:
        """Perform one action. A scheduler that notices a gap requests a snapshot."""
        match action:
            case Send(_, IndexDelta() | IndexSnapshot() as message):
                lost = self.lost_messages and self.rng.random() < 0.1
                if not lost and self.mirror.hear(message):
                    self.core.receive(ActorId("scheduler-0.1"), IndexWanted(0), self.now)
            case Send(to, message):
                self.hear(to, message)
            case Copy():
                self.copies.append(action)
            case Kill(actor):
                assert not any(one.id == actor for one in self.clients.values()), f"{actor} lives"

    def hear(self, to: ActorId, message: object) -> None:
        """Deliver an answer to its client if that incarnation still lives; free leases that no call wants."""
        client = next((one for one in self.clients.values() if one.id == to), None)
        if client is None:
            return
        done, _ = client.asked.pop(message.call, (None, None))
        if done is not None:
            self.count(type(message).__name__ if not isinstance(message, PoolRefused) else message.code)
            done(message)
        elif isinstance(message, Acquired | Arrival) and message.lease not in client.leases:
            self.core.receive(to, FreeMem(message.lease), self.now)

    def count(self, what: str) -> None:
        """Count an event, so that the test can check that it happened."""
        self.seen[what] = self.seen.get(what, 0) + 1

    def ask(self, client: Client, make: Callable[[int], object], done: Callable[[object], None]) -> None:
        """Make one call; ``done`` gets the answer."""
        client.call += 1
        message = make(client.call)
        client.asked[client.call] = (done, message)
        self.say(client.id, message)

    # ---- bytes ---------------------------------------------------------------------------------------------

    def content(self, scope: str, tokens: bytes, page: int) -> tuple[str, bytes]:
        """Simulated contents of a page: all that its KV depends on."""
        return scope, span(tokens, 0, (page + 1) * PAGE)

    def verify(self, held: Held, pages: int) -> None:
        """Check that the first ``pages`` pages hold exactly the contents for the lease's tokens."""
        for i in range(pages):
            assert self.memory.get(held.pages[i]) == self.content(held.scope, held.tokens, i), "wrong bytes"

    def fill(self, held: Held, start: int) -> None:
        """Write the pages after the first ``start`` tokens, as a step would."""
        for i in range(start // PAGE, -(-count(held.tokens) // PAGE)):
            self.memory[held.pages[i]] = self.content(held.scope, held.tokens, i)

    def copy_ends(self) -> None:
        """End a random copy."""
        copy = self.copies.pop(self.rng.randrange(len(self.copies)))
        bad = []
        for source, target, n in copy.runs:
            for i in range(n):
                rotten = tier_of(source) == Tier.DISK and self.rng.random() < 0.2
                bad += [source + i] if rotten else []
                self.memory[target + i] = None if rotten else self.memory.get(source + i)
            self.count(f"{Tier(tier_of(source)).name} to {Tier(tier_of(target)).name}")
            if bad:
                self.count("bad")
        self.say(ActorId("s0.1"), CopyDone(copy.id, tuple(bad)))

    # ---- calls ---------------------------------------------------------------------------------------------

    def acquire(self, client: Client) -> None:
        """Acquire a prompt; on the grant, check the cached pages and fill the rest."""
        scope, tokens = self.rng.choice("xy"), self.rng.choice(self.prompts)
        extra = self.rng.randrange(3)

        def done(answer: object) -> None:
            if isinstance(answer, Acquired):
                held = Held(scope, tokens, answer.pages, answer.cached_tokens)
                assert not any(map(tier_of, answer.pages))
                self.verify(held, answer.cached_tokens // PAGE)
                self.fill(held, answer.cached_tokens)
                client.leases[answer.lease] = held

        self.ask(client, lambda call: Acquire(call, scope, tokens, extra), done)

    def match(self, client: Client) -> None:
        """Match a prompt; the cached prefix is pinned in the tiers where it is."""
        scope, tokens = self.rng.choice("xy"), self.rng.choice(self.prompts)

        def done(answer: object) -> None:
            if isinstance(answer, Acquired):
                held = Held(scope, span(tokens, 0, answer.cached_tokens), answer.pages, answer.cached_tokens)
                assert all(tier_of(page) < Tier.DISK for page in answer.pages)
                self.verify(held, len(answer.pages))
                client.leases[answer.lease] = held

        self.ask(client, lambda call: Match(call, scope, tokens), done)

    def alloc(self, client: Client, lease: int, held: Held) -> None:
        """Allocate more pages for a lease and put tokens into them."""
        more = pack(self.rng.randrange(3) for _ in range(self.rng.randrange(9)))

        def done(answer: object) -> None:
            if isinstance(answer, Allocated) and lease in client.leases:
                start = count(held.tokens)
                held.pages += answer.pages
                held.tokens += span(more, 0, max(len(held.pages) * PAGE - start, 0))
                self.fill(held, max(start, held.retired))

        tier = self.rng.choice([0, 0, 0, 1])
        self.ask(client, lambda call: AllocMem(call, lease, self.rng.randrange(3), tier), done)

    def insert(self, client: Client, lease: int, held: Held) -> None:
        """Retire a lease's full pages into the index."""
        full = count(held.tokens) // PAGE * PAGE
        start, held.retired = held.retired, max(full, held.retired)
        tokens = span(held.tokens, start, full)
        self.ask(client, lambda call: Insert(call, lease, start, tokens), lambda answer: None)

    def swap_in(self, client: Client, lease: int, held: Held) -> None:
        """Swap a lease's pages in; the client makes no other call on the lease until the answer."""
        del client.leases[lease]

        def done(answer: object) -> None:
            client.leases[lease] = held
            if isinstance(answer, Acquired):
                held.pages = answer.pages

        self.ask(client, lambda call: SwapIn(call, lease), done)

    def free(self, client: Client, lease: int) -> None:
        """End a lease."""
        del client.leases[lease]
        self.ask(client, lambda call: FreeMem(lease, call), lambda answer: None)

    def hand_over(self, client: Client, lease: int) -> None:
        """Let another owner adopt a lease."""
        other = self.rng.choice([one for one in self.clients.values() if one is not client])
        held = client.leases.pop(lease)

        def done(answer: object) -> None:
            if not isinstance(answer, PoolRefused):
                other.leases[lease] = held

        self.ask(other, lambda call: Adopt(call, lease, client.id), done)

    def withdraw(self, client: Client) -> None:
        """Withdraw a call that is waiting for an answer."""
        waiting = [call for call, (_, asked) in client.asked.items() if isinstance(asked, MAY_WAIT)]
        if waiting:
            call = self.rng.choice(waiting)
            _, asked = client.asked.pop(call)
            self.say(client.id, FreeMem(0, call))
            self.withdrawn(client, asked)

    def withdrawn(self, client: Client, asked: object) -> None:
        """Called when a client has withdrawn a call."""

    def repeat(self, client: Client) -> None:
        """Deliver a pending call a second time."""
        if client.asked:
            self.say(client.id, self.rng.choice([asked for _, asked in client.asked.values()]))

    def die(self, name: str) -> None:
        """Kill an owner as by kill -9; the shard is told, or notices by the silence."""
        old = self.clients[name].id
        self.born(name)
        self.count("died")
        if self.rng.random() < 0.5:
            self.say(ActorId("scheduler-0.1"), Gone((old,)))

    def live(self, seconds: float) -> None:
        """Let time pass; living clients send heartbeats."""
        self.now += seconds
        for client in self.clients.values():
            self.say(client.id, Load(Member(client.id, "Client", "", 1, "ready")))
        self.core.advance(self.now)
        self.act()

    def step(self) -> None:
        """Let one random thing happen."""
        name = self.rng.choice(list(self.clients))
        client = self.clients[name]
        roll = self.rng.random()
        if self.copies and roll < 0.3:
            self.copy_ends()
        elif roll < 0.33:
            self.live(self.rng.random())
        elif roll < 0.5 or (roll < 0.9 and not client.leases):
            if len(client.asked) < 2 or roll < 0.36:
                self.acquire(client)
        elif roll < 0.9:
            lease, held = self.rng.choice(list(client.leases.items()))
            self.verify(held, held.retired // PAGE)
            act = self.rng.choices(
                [self.insert, self.alloc, self.swap_in, self.free, self.hand_over], [4, 2, 1, 5, 1]
            )[0]
            act(client, lease) if act in (self.free, self.hand_over) else act(client, lease, held)
        else:
            self.rarely(name, client)

    def rarely(self, name: str, client: Client) -> None:
        """Let one of the rarer things happen."""
        scope, prompt, n = self.rng.choice("xy"), self.rng.choice(self.prompts), self.rng.randrange(5)
        tier = self.rng.randrange(3)
        match self.rng.randrange(10):
            case 0 | 1:
                self.match(client)
            case 2:
                self.withdraw(client)
            case 3:
                self.repeat(client)
            case 4:
                self.say(client.id, Prefetch(scope, prompt))
            case 5:
                self.ask(client, lambda call: SwapOut(call, n, tier), lambda answer: None)
            case 6:
                self.ask(client, lambda call: Evict(call, n, tier), lambda answer: None)
            case 7:
                self.live(1.0)
            case _ if self.rng.random() < 0.6:
                self.die(name)
            case _:
                self.ask(client, lambda call: Delete(call, scope, prompt), lambda answer: None)

    def end(self) -> None:
        """Kill all clients and end all copies: nothing may be left."""
        gone = tuple(one.id for one in self.clients.values())
        self.clients.clear()
        self.say(ActorId("scheduler-0.1"), Gone(gone))
        while self.copies:
            self.copy_ends()
        self.now += 60.0
        self.core.advance(self.now)
        self.act()
        while self.copies:
            self.copy_ends()
