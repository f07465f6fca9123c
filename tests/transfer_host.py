"""One shard process for tests of transfers: an arena, both cores, real movers, a plain control connection.

``python transfer_host.py NAME INCARNATION PATH ADDRESS PEER`` listens on ADDRESS (host:port) for control
messages. With a PEER (its id@host:port) it is the sender. It reads commands from stdin and writes events to
stdout, one JSON object per line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import attrs
import msgspec
import trio
from setproctitle import setproctitle

from memserve import transfer_messages as messages
from memserve.actions import Kill
from memserve.actors.mempool_shard import fence
from memserve.kernels.arena import Arena, serve_arena
from memserve.messages import Gone
from memserve.processes.lifecycle import process_title
from memserve.transfer.actions import (
    Expect,
    Feed,
    Forget,
    Order,
    Post,
    Ready,
    Received,
    ReceiveFailed,
    Report,
    StopReceiving,
    StopWriting,
    Withdraw,
    Write,
    WriteFailed,
    Wrote,
)
from memserve.transfer.incoming import Incoming
from memserve.transfer.mover import host_identity
from memserve.transfer.outgoing import Outgoing
from memserve.transfer.settings import TransferSettings
from memserve.transfer.shell import open_transfers
from memserve.transfer.values import Geometry, Piece
from memserve.transfer_messages import Granularity, TransferRefused

GEOMETRY = Geometry(page_bytes=64_000, layers=8)
PAGES = 64
KINDS = {kind.__name__: kind for kind in (*messages.ToReceiver.__args__, *messages.ToSender.__args__)}
MOVER_ACTIONS = (Write, Feed, StopWriting, Forget, Expect, StopReceiving)
TO_OUTGOING = (*messages.ToSender.__args__, Gone, Order, Ready, Withdraw, Wrote, WriteFailed)
TO_INCOMING = (*messages.ToReceiver.__args__, Gone, Received, ReceiveFailed)


def say(event, **data):
    """Print an event for the test."""
    print(json.dumps({"event": event, **data}), flush=True)


def content(page):
    """Contents of the sender's page with this number."""
    return bytes([page + 1]) * GEOMETRY.page_bytes


@attrs.define(eq=False)
class HostPool:
    """A pool of free pages that checks the contents of committed pages."""

    memory: memoryview
    free: list[int] = attrs.field(factory=lambda: list(range(PAGES)))
    granted: tuple[int, ...] = ()

    def grant(self, key, offer):
        """See the protocol."""
        self.granted = tuple(self.free.pop() for _ in range(offer.pages))
        return self.granted

    def commit(self, key, offer, pages):
        """See the protocol."""
        size = GEOMETRY.page_bytes
        whole = all(self.memory[page * size :][:size] == content(i) for i, page in enumerate(pages))
        say("commit", id=key[1], whole=whole)
        return 0

    def release(self, key, offer, pages):
        """See the protocol."""
        self.free += pages
        self.granted = ()
        say("release", id=key[1], free=len(self.free))


@attrs.define(eq=False)
class Host:
    """The shard process: both cores, their movers and control connections."""

    id: str
    pool: HostPool
    outgoing: Outgoing
    incoming: Incoming
    perform: dict = attrs.field(factory=dict)
    streams: dict[str, trio.SocketStream] = attrs.field(factory=dict)
    outbox: list = attrs.field(factory=list)
    timer: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    def tell(self, message, sender=None):
        """Give a message to the core that it concerns, and take a turn."""
        now = time.monotonic()
        for core, kinds in ((self.outgoing, TO_OUTGOING), (self.incoming, TO_INCOMING)):
            if isinstance(message, kinds):
                core.receive(sender or self.id, message, now)
        self.turn()

    def turn(self):
        """Advance both cores and perform their actions."""
        now = time.monotonic()
        for core in (self.outgoing, self.incoming):
            core.advance(now)
            for action in core.take():
                self.act(action)
            core.check()
        due = min(self.outgoing.deadline, self.incoming.deadline)
        self.timer.deadline = trio.current_time() + max(due - now, 0.0)

    def act(self, action):
        """Perform one action."""
        if isinstance(action, MOVER_ACTIONS):
            self.perform[type(action)](action)
        elif isinstance(action, Post):
            if isinstance(action.message, TransferRefused):
                say("refused", failure=action.message.failure)
            self.outbox.append((action.to, action.message))
        elif isinstance(action, Report):
            failure = getattr(action.result, "failure", None)
            say("report", id=action.result.id, failure=failure)
        elif isinstance(action, Kill):
            fence(action)

    # ---- tasks -----------------------------------------------------------------------------------------------

    async def keep_deadlines(self):
        """Take a turn whenever a core's deadline is due."""
        while True:
            with trio.CancelScope() as self.timer:
                self.turn()
                await trio.sleep_forever()

    async def post(self):
        """Send the messages in the outbox; a message that cannot be sent is lost."""
        while True:
            await trio.sleep(0.001)
            while self.outbox:
                to, message = self.outbox.pop(0)
                body = msgspec.msgpack.encode([self.id, type(message).__name__, message])
                try:
                    with trio.move_on_after(1.0):
                        await self.streams[to].send_all(len(body).to_bytes(4, "little") + body)
                except (KeyError, trio.BrokenResourceError, trio.ClosedResourceError):
                    pass

    async def converse(self, stream):
        """Read one control connection to its end."""
        buffer = b""
        try:
            async for chunk in stream:
                buffer += chunk
                while len(buffer) >= 4 and len(buffer) >= 4 + (n := int.from_bytes(buffer[:4], "little")):
                    sender, kind, raw = msgspec.msgpack.decode(
                        buffer[4 : 4 + n], type=tuple[str, str, msgspec.Raw]
                    )
                    buffer = buffer[4 + n :]
                    self.streams[sender] = stream
                    self.tell(msgspec.msgpack.decode(raw, type=KINDS[kind]), sender)
        except trio.BrokenResourceError:
            pass

    async def watch(self):
        """Report once that the granted pages are being filled (the first one has data)."""
        size = GEOMETRY.page_bytes
        while True:
            await trio.sleep(0.002)
            if self.pool.granted and self.pool.memory[self.pool.granted[0] * size]:
                say("half")
                return

    async def obey(self, nursery):
        """Carry out commands: send ID PAGES SECONDS PEER; layers ID FROM TO PAGES; gone ACTOR; quit."""
        async for line in trio.wrap_file(sys.stdin):
            match line.split():
                case ["send", number, pages, seconds, peer]:
                    due = time.monotonic() + float(seconds)
                    order = Order(
                        peer, int(number), tuple(range(int(pages))), due, Granularity.BY_LAYER, fed=True
                    )
                    self.tell(order)
                case ["layers", number, first, last, pages]:
                    layers = range(int(first), int(last))
                    self.tell(Ready(int(number), tuple(Piece(0, int(pages), layer) for layer in layers)))
                case ["gone", actor]:
                    self.tell(Gone((actor,)))
                case _:
                    break
        nursery.cancel_scope.cancel()


async def main(name, incarnation, path, address, peer=""):
    """Run until the command quit or the end of stdin."""
    actor = f"{name}.{incarnation}"
    arena = Arena.create(actor, PAGES, GEOMETRY.page_bytes)
    for page in range(PAGES if peer else 0):
        arena.memory[page * GEOMETRY.page_bytes :][: GEOMETRY.page_bytes] = content(page)
    host, port = address.split(":")
    socket_path = Path(tempfile.mkdtemp()) / "arena"
    pool = HostPool(arena.memory)
    identity = host_identity()
    node = Host(
        actor,
        pool,
        Outgoing(actor, GEOMETRY, identity, os.getpid(), ()),
        Incoming(GEOMETRY, identity, pool, ()),
    )
    async with trio.open_nursery() as nursery:
        config = TransferSettings(path=path, host=host)
        await nursery.start(serve_arena, arena, socket_path)
        async with open_transfers(config, arena, GEOMETRY, socket_path, node.tell) as shell:
            node.perform = shell.perform
            node.outgoing.paths, node.incoming.ways = shell.paths, shell.ways
            listeners = await nursery.start(partial(trio.serve_tcp, host=host), node.converse, int(port))
            if peer:
                peer_id, _, place = peer.partition("@")
                peer_host, peer_port = place.split(":")
                node.streams[peer_id] = await trio.open_tcp_stream(peer_host, int(peer_port))
                nursery.start_soon(node.converse, node.streams[peer_id])
            nursery.start_soon(node.keep_deadlines)
            nursery.start_soon(node.post)
            nursery.start_soon(node.watch)
            say("ready", port=listeners[0].socket.getsockname()[1])
            await node.obey(nursery)
    os._exit(0)  # a thread may still wait for stdin


if __name__ == "__main__":
    setproctitle(process_title(sys.argv[1], "of a test"))  # by which a shard knows whom it kills
    trio.run(main, *sys.argv[1:])
