"""Two shards with simulated memory and movers, and clients of both that make random calls and die at random.

A site is a shard with its clients (:class:`World`). A client has the same id at both sites and dies at both.
"""

from __future__ import annotations

import random

import attrs

from memserve.actions import MoverOrder, Send
from memserve.client.pool import MAY_WRITE_ON
from memserve.identity import ActorId
from memserve.mempool.addresses import Home, tier_of
from memserve.mempool.exchange import Exchange
from memserve.mempool.pool import Pool
from memserve.mempool.room import Capacity
from memserve.mempool.shard import ShardCore
from memserve.pool_messages import (
    Acquire,
    Acquired,
    Adopt,
    Adopted,
    AllocMem,
    Arrival,
    FreeMem,
    NextArrival,
    PoolRefused,
    Prefetch,
    Source,
    Transfer,
    Transferred,
)
from memserve.tokens import count, pack, span
from memserve.transfer.actions import StopWriting, Write, WriteFailed, Wrote
from memserve.transfer.values import Geometry
from memserve.transfer_messages import Failure, Way
from shard_clients import PAGE, SCHEDULER, Client, Held, World

PAGE_BYTES = 16


@attrs.define(eq=False)
class Stream:
    """A transfer that a mover is carrying out."""

    write: Write
    moved: int = 0
    stopped: bool = False


@attrs.define(eq=False)
class Site(World):
    """One of the two shards with its clients."""

    number: int = 0
    pair: Pair | None = None
    streams: dict[int, Stream] = attrs.field(factory=dict)

    def make_core(self) -> ShardCore:
        """The core of a shard that exchanges pages with the other one."""
        me = ActorId(f"s{self.number}.1")
        pool = Pool(self.capacity, PAGE, 5.0, home=Home(self.number, self.seed))
        exchange = Exchange(pool, me, Geometry(PAGE_BYTES, 1), "host", 1)
        exchange.open(("mapped",), (Way("mapped", me),))
        return ShardCore(pool, waiting_max=12, remembered_max=50, schedulers=(SCHEDULER,), exchange=exchange)

    @property
    def other(self) -> Site:
        """The other shard."""
        return self.pair.sites[1 - self.number]

    # ---- the world -------------------------------------------------------------------------------------------

    def perform(self, action: object) -> None:
        """Perform one action; messages to the other shard spend some time on the wire."""
        match action:
            case Send(to, message) if to == self.other.core.me:
                self.pair.post(self, message)
            case MoverOrder(Write() as write):
                self.streams[write.transfer.id] = Stream(write)
            case MoverOrder(StopWriting(number)):
                if number in self.streams:
                    self.streams[number].stopped = True
            case _:
                super().perform(action)

    def die(self, name: str) -> None:
        """Kill a client as by kill -9; each shard notices it in its own way."""
        for site in self.pair.sites:
            World.die(site, name)

    def live(self, seconds: float) -> None:
        """Let time pass at both sites."""
        for site in self.pair.sites:
            World.live(site, seconds)

    def move(self) -> None:
        """Let a random mover move one page, break, or finish."""
        number = self.rng.choice(list(self.streams))
        one = self.streams[number]
        transfer = one.write.transfer
        if one.stopped:
            self._moved(number, WriteFailed(number, Failure.WITHDRAWN, "stopped"))
        elif self.rng.random() < 0.02:
            self._moved(number, WriteFailed(number, Failure.CUT, "cut"))
        elif one.moved < len(transfer.source):
            source, target = transfer.source[one.moved], transfer.destination[one.moved]
            self.other.memory[target] = self.memory.get(source)
            one.moved += 1
        else:
            self._moved(number, Wrote(number, PAGE_BYTES * len(transfer.source)))

    def _moved(self, number: int, outcome: object) -> None:
        del self.streams[number]
        self.count(type(outcome).__name__)
        self.say(self.core.me, outcome)

    # ---- calls that concern both shards ----------------------------------------------------------------------

    def step(self) -> None:
        """Let one random thing happen."""
        roll = self.rng.random()
        if self.streams and roll < 0.4:
            self.move()
        elif self.pair.wire and roll < 0.6:
            self.pair.deliver()
        elif roll < 0.7:
            self.across(self.clients[self.rng.choice(list(self.clients))])
        else:
            super().step()

    def across(self, client: Client) -> None:
        """Make a random call that concerns the other shard, unless three calls of the client are pending."""
        if len(client.asked) < 3:
            call = self.rng.choices(
                [self.fetch, self.hand_over_from, self.transfer, self.receive], [3, 2, 6, 2]
            )
            call[0](client)

    def fetch(self, client: Client) -> None:
        """Acquire or prefetch a prompt, with pages that the other shard's index may hold as a source."""
        scope, tokens = self.rng.choice("xy"), self.rng.choice(self.prompts)
        expected = self.rng.randrange(1, count(tokens) // PAGE * PAGE + 2)
        source = Source(
            self.other.core.me, min(expected, count(tokens)), self.patience(), request=self.request()
        )
        if self.rng.random() < 0.3:
            whole = span(tokens, 0, count(tokens) // PAGE * PAGE)
            ahead = self.rng.random() < 0.5
            self.say(
                client.id, Prefetch(scope, whole, attrs.evolve(source, tokens=count(whole), ahead=ahead))
            )
        else:
            self.acquire_from(client, scope, tokens, source)

    def hand_over_from(self, client: Client) -> None:
        """Acquire a prompt with the pages of a lease that some client has at the other shard."""
        leases = [(one, *held) for one in self.other.clients.values() for held in one.leases.items()]
        if leases:
            owner, lease, held = self.rng.choice(leases)
            if count(held.tokens) and count(held.tokens) <= len(held.pages) * PAGE:
                self.pair.read_from.add(lease)
                more = held.tokens + pack([self.rng.randrange(3)])
                options = (self.patience(), lease, owner.id, self.rng.random() < 0.5, self.request())
                self.acquire_from(
                    client, held.scope, more, Source(self.other.core.me, count(held.tokens), *options)
                )

    def acquire_from(self, client: Client, scope: str, tokens: bytes, source: Source) -> None:
        """Acquire from ``source``; on the grant, check the pages found here and the pages fetched."""

        def done(answer: object) -> None:
            if isinstance(answer, Acquired):
                there = answer.cached_tokens + answer.fetched_tokens
                held = Held(scope, tokens, answer.pages, answer.cached_tokens)
                self.verify(held, there // PAGE)
                self.count("fetched") if answer.fetched_bytes else None
                self.fill(held, there)
                client.leases[answer.lease] = held

        self.ask(client, lambda call: Acquire(call, scope, tokens, 1, source), done)

    def request(self) -> str:
        """A request that pages belong to: handoffs wait for pages sent ahead for the same request."""
        return self.rng.choice(["", "r1", "r2"])

    def patience(self) -> float:
        """A random deadline, in seconds."""
        return self.rng.choice([0.5, 2.0, 20.0])

    def transfer(self, client: Client) -> None:
        """Send a lease's full pages to the other shard: to new or given pages, for the client or another."""
        if not client.leases:
            return
        lease, held = self.rng.choice(list(client.leases.items()))
        pages = min(count(held.tokens) // PAGE, len(held.pages))
        name = client.id.partition(".")[0]
        mine = self.other.clients[name]
        target = self.rng.choice(list(self.other.clients.values()))
        sent = Held(held.scope, span(held.tokens, 0, pages * PAGE), held.pages[:pages], 0)
        insert = self.rng.random() < 0.5
        call = Transfer(
            0, self.other.core.me, sent.scope, (lease,), self.core.pool.home.addresses(sent.pages), self.patience(),
            tokens=sent.tokens if insert else b"", owner=target.id, private=self.pair.note(sent, insert),
        )  # fmt: skip
        if target is not mine:
            self._push(client, call, lambda answer: None)
        elif self.rng.random() < 0.5:
            self._push(client, call, lambda answer: self.other.claim(mine, sent, insert, answer))
        elif into := self._room_for(mine, sent):
            self._fill(client, call, mine, into, sent)
        else:

            def granted(answer: object) -> None:
                if isinstance(answer, Acquired):
                    mine.leases[answer.lease] = Held(sent.scope, b"", answer.pages, 0)
                    self._fill(client, call, mine, answer.lease, sent)

            self.other.ask(mine, lambda number: AllocMem(number, 0, pages + 1, 0, sent.scope), granted)

    def _fill(self, client: Client, call: Transfer, mine: Client, into: int, sent: Held) -> None:
        """Send into a lease at the other shard; nothing else is asked of that lease until this ends."""
        held = mine.leases.pop(into)
        there = self.other.core.pool.home.addresses(held.pages[: len(sent.pages)])
        call, insert = attrs.evolve(call, destination=there, into=into), bool(call.tokens)
        self._push(client, call, lambda answer: self.other.filled(mine, into, held, sent, insert, answer))

    def _push(self, client: Client, call: Transfer, done) -> None:
        self.ask(client, lambda number: attrs.evolve(call, call=number), done)

    def _room_for(self, client: Client, sent: Held) -> int:
        """A lease whose first pages may be overwritten, or 0.

        One time in ten its pages may also be retired or in another tier than the device.
        """
        for lease, held in client.leases.items():
            enough = len(held.pages) >= len(sent.pages) > 0 and held.scope == sent.scope
            careless = self.rng.random() < 0.1
            if (
                lease not in self.pair.read_from
                and enough
                and (careless or not (held.retired or any(map(tier_of, held.pages))))
            ):
                return lease
        return 0

    def filled(
        self, client: Client, lease: int, held: Held, sent: Held, insert: bool, answer: object
    ) -> None:
        """A transfer into a lease at this site has ended."""
        if isinstance(answer, Transferred):
            held.tokens, held.retired = sent.tokens, count(sent.tokens) if insert else 0
            self.verify(held, len(sent.pages))
            self.count("filled")
        if isinstance(answer, PoolRefused) and answer.code in MAY_WRITE_ON:
            self.ask(client, lambda call: FreeMem(lease, call), lambda answer: None)
        else:
            client.leases[lease] = held

    def claim(self, client: Client, sent: Held, insert: bool, answer: object) -> None:
        """Adopt the lease of new pages that the client's transfer created at this site."""
        if not isinstance(answer, Transferred):
            return
        lease = answer.lease
        held = Held(sent.scope, sent.tokens, answer.pages, count(sent.tokens) if insert else 0)

        def done(answer: object) -> None:
            if isinstance(answer, Adopted):
                self.verify(held, len(held.pages))
                self.count("claimed")
                client.leases[lease] = held

        self.ask(client, lambda call: Adopt(call, lease, client.id), done)

    def receive(self, client: Client) -> None:
        """Wait for the next pages that a client has sent here, unless already waiting."""

        def done(answer: object) -> None:
            if isinstance(answer, Arrival):
                sent, insert = self.pair.sent[int(answer.private)]
                assert answer.cached_tokens == (count(sent.tokens) if insert else 0)
                held = Held(sent.scope, sent.tokens, answer.pages, answer.cached_tokens)
                self.verify(held, len(held.pages))
                client.leases[answer.lease] = held

        if not any(isinstance(asked, NextArrival) for _, asked in client.asked.values()):
            self.ask(client, NextArrival, done)

    def withdrawn(self, client: Client, asked: object) -> None:
        """Free the lease that a withdrawn transfer was to fill: a mover may still be writing into it."""
        if isinstance(asked, Transfer) and asked.into:
            mine = self.other.clients[client.id.partition(".")[0]]
            self.other.ask(mine, lambda call: FreeMem(asked.into, call), lambda answer: None)


@attrs.define(eq=False)
class Pair:
    """Both shards and the wire between them, which delays messages and sometimes loses or repeats one."""

    seed: int
    capacity: tuple[Capacity, Capacity]
    rng: random.Random = attrs.field(init=False)
    sites: list[Site] = attrs.field(factory=list)
    wire: list[tuple[Site, object]] = attrs.field(factory=list)
    sent: list[tuple[Held, bool]] = attrs.field(factory=list)
    read_from: set[int] = attrs.field(factory=set)
    """Leases whose pages were handed over to a request: transfers do not overwrite them."""
    lossless: bool = False

    def __attrs_post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        for number, capacity in enumerate(self.capacity):
            site = Site(self.seed, capacity, number=number, pair=self)
            site.rng = self.rng
            self.sites.append(site)
        self.sites[1].prompts = self.sites[0].prompts

    def note(self, sent: Held, insert: bool) -> bytes:
        """Private data to send with pages, from which the receiver knows what they must hold."""
        self.sent.append((sent, insert))
        return str(len(self.sent) - 1).encode()

    def post(self, sender: Site, message: object) -> None:
        """Send a message from one shard to the other."""
        if self.lossless or self.rng.random() > 0.05:
            self.wire.append((sender, message))
            if self.rng.random() < 0.05 and not self.lossless:
                self.wire.append((sender, message))

    def deliver(self) -> None:
        """Deliver the oldest message of a random direction: messages of one direction keep their order."""
        sender = self.rng.choice([one for one, _ in self.wire])
        i = next(i for i, (one, _) in enumerate(self.wire) if one is sender)
        _, message = self.wire.pop(i)
        sender.other.say(sender.core.me, message)

    def run(self, steps: int) -> None:
        """Let ``steps`` random things happen."""
        for _ in range(steps):
            self.rng.choice(self.sites).step()

    def end(self) -> None:
        """Kill all clients and let everything under way end: nothing may be left."""
        self.lossless = True
        for name in ("a", "b", "c"):
            self.sites[0].die(name)
        for _ in range(60):
            self.settle()
            self.sites[0].live(1.0)
        for site in self.sites:
            site.end()
        self.settle()

    def settle(self) -> None:
        """Deliver all messages and finish all transfers and copies."""
        while self.wire or any(site.streams or site.copies for site in self.sites):
            while self.wire:
                self.deliver()
            for site in self.sites:
                if site.streams:
                    site.move()
                if site.copies:
                    site.copy_ends()
