"""The mover for any two hosts: one plain TCP connection per transfer, from arena to arena.

The receiver announces ``host:port`` and a token that it drew at its start. Only a sender that was given the
token can send, and it proves that it knows the token without sending it. Only granted transfers are let in,
and only into the pages granted to them: the sender names positions in the transfer, never addresses. Nothing
is encrypted: across hosts, the network between the shards must be a trusted one.
"""

from __future__ import annotations

import hmac
import secrets
import zlib
from collections.abc import Callable
from functools import partial

import attrs
import trio

from memserve.transfer import tcp_wire as wire
from memserve.transfer.actions import Expect, Received, ReceiveFailed
from memserve.transfer.incoming import Key
from memserve.transfer.mover import Memory, MoveError, PieceFeed, check_pages, settle
from memserve.transfer.tcp_wire import Connection, Header, Hello
from memserve.transfer.values import Coverage, PageTransfer, Piece, Result, spans, split
from memserve.transfer_messages import Failure, Way

CONNECT_S = 3.0
"""Longest wait for a connection, and for the hello on a new one."""
CONNECTIONS_MAX = 256
"""Connections at a time; one more is closed at once."""
LINGER_S = 1.0
"""How long a refused sender's bytes are read and dropped: otherwise a reset could overtake the reason."""


# ---- sender --------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class TcpMover:
    """Sends from ``memory`` to the listeners of other shards."""

    memory: Memory
    path: str = attrs.field(default="tcp", init=False)

    async def send(self, transfer: PageTransfer, way: Way, feed: PieceFeed, deadline_s: float) -> Result:
        """See Mover.

        Fails with PEER_GONE when no process listens, or with the failure that the receiver answers.
        """
        return await settle(transfer, deadline_s, partial(self._move, transfer, way, feed))

    def forget(self, way: Way) -> None:
        """Do nothing: no state is kept for a receiver."""

    def close(self) -> None:
        """Do nothing: no state is kept at all."""

    async def _move(self, transfer: PageTransfer, way: Way, feed: PieceFeed) -> int:
        check_pages(transfer, self.memory.pages)
        sent = 0
        async with await _connected(way.address) as stream:
            connection = Connection(stream.socket)
            with connection.watched():
                sending = _Sending(connection, transfer, self.memory, feed)
                await sending.introduce(way.data)
                sent = await sending.run()
        return sent


@attrs.define(eq=False)
class _Sending:
    """One transfer on its connection."""

    connection: Connection
    transfer: PageTransfer
    memory: Memory
    feed: PieceFeed
    _sent: int = attrs.field(default=0, init=False)
    _failed: MoveError | None = attrs.field(default=None, init=False)

    @property
    def _parts(self) -> int:
        return self.memory.geometry.parts(self.transfer.granularity)

    async def introduce(self, token: bytes) -> None:
        """Say hello and wait to be let in. Raises MoveError."""
        one = self.transfer
        page_bytes = self.memory.geometry.page_bytes
        hello = Hello(one.sender, one.id, len(one.source), page_bytes, self._parts)
        await self.connection.write([hello.encode(token)])
        await wire.read_verdict(self.connection)

    async def run(self) -> int:
        """Send everything; returns the bytes sent once the receiver says that it has them all.

        Raises MoveError.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_pieces)
            nursery.start_soon(self.connection.keep_alive, wire.STILL_HERE)
            # The verdict may come at any time: a receiver need not read the rest of what it refuses.
            try:
                await wire.read_verdict(self.connection)
            except MoveError as error:
                self._failed = error
            nursery.cancel_scope.cancel()
        if self._failed:
            raise self._failed
        return self._sent

    async def _send_pieces(self) -> None:
        try:
            while some := await self.feed.take():
                for piece in some:
                    for frame in split(piece, self._pages_a_frame):
                        await self._send(frame)
        except MoveError:
            pass  # run() finds the same connection cut, or a reason that came before

    @property
    def _pages_a_frame(self) -> int:
        part_bytes = self.memory.geometry.page_bytes // self._parts
        return min(max(wire.FRAME_BYTES // part_bytes, 1), wire.VIEWS_MAX)

    async def _send(self, piece: Piece) -> None:
        views = _views(self.memory, piece, self.transfer.source, self._parts)
        await self.connection.write([Header(piece, _checksum(views)).encode(), *views])
        self._sent += sum(view.nbytes for view in views)


async def _connected(address: str) -> trio.SocketStream:
    host, _, port = address.rpartition(":")
    try:
        with trio.fail_after(CONNECT_S):
            return await trio.open_tcp_stream(host.strip("[]"), int(port))
    except (OSError, trio.TooSlowError) as error:
        raise MoveError(Failure.PEER_GONE, f"no answer at {address}: {error}") from error


# ---- receiver ------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Expected:
    granted: Expect
    tell: Callable[[Received | ReceiveFailed], None]
    stopping: trio.CancelScope | None = None
    """Cancel scope of the connection that brings the transfer; None before there is one."""


@attrs.define(eq=False)
class TcpReceiver:
    """Lets expected transfers into ``memory``, and nothing else."""

    memory: Memory
    host: str
    """Address to listen on, at which senders reach this side. ``port`` 0 means any free one."""
    port: int = 0
    token: bytes = attrs.field(factory=partial(secrets.token_bytes, wire.TOKEN_BYTES), repr=False)
    """Drawn in every incarnation: no message meant for an earlier one opens this one's memory."""
    way: Way = attrs.field(init=False, repr=False)
    """The way to ``memory``; set once :meth:`serve` has started."""
    _expected: dict[Key, _Expected] = attrs.field(factory=dict, init=False)
    _connections: int = attrs.field(default=0, init=False)

    async def serve(self, *, task_status: trio.TaskStatus[Way] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled; the start value is the way to announce to senders.

        Raises OSError when ``host`` is not an address of this machine or ``port`` is taken.
        """
        listeners = await trio.open_tcp_listeners(self.port, host=self.host)
        for other in listeners[1:]:  # if the name has several addresses, only the first is used
            await other.aclose()
        port = listeners[0].socket.getsockname()[1]
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.way = Way("tcp", f"{host}:{port}", self.token)
        await trio.serve_listeners(
            self._serve_one, listeners[:1], task_status=_Started(task_status, self.way)
        )

    def expect(self, granted: Expect, tell: Callable[[Received | ReceiveFailed], None]) -> None:
        """Let this transfer in.

        ``tell`` is called once, from a task: when all bytes are there, or no more come in.
        """
        self._expected[granted.sender, granted.id] = _Expected(granted, tell)

    def stop(self, key: Key) -> bool:
        """Let no more of a transfer in. False if none of it was under way: then ``tell`` is not called."""
        one = self._expected.get(key)
        if one is None:
            return True  # it has reported how it ended
        if one.stopping is None:
            del self._expected[key]
            return False
        one.stopping.cancel()
        return True

    # ---- one connection --------------------------------------------------------------------------------------

    async def _serve_one(self, stream: trio.SocketStream) -> None:
        if self._connections >= CONNECTIONS_MAX:
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        try:
            async with stream:
                connection = Connection(stream.socket)
                try:
                    await self._admit(connection)
                except MoveError as error:
                    await _say_why(connection, error)
        finally:
            self._connections -= 1

    async def _admit(self, connection: Connection) -> None:
        """Find out which transfer a connection brings, and receive it. Raises MoveError."""
        try:
            with trio.fail_after(CONNECT_S):
                hello, proof = await wire.read_hello(connection)
        except trio.TooSlowError as error:
            raise MoveError(Failure.REFUSED, "no hello came") from error
        one = self._find(hello, proof)
        key = (hello.sender, hello.id)
        failure: MoveError | None = MoveError(Failure.WITHDRAWN, "the receiver stopped it")
        with trio.CancelScope() as one.stopping:
            failure = await self._attempt(connection, one)
        del self._expected[key]
        if failure is None:
            one.tell(Received(*key))
            await connection.write([wire.DONE])
        else:
            one.tell(ReceiveFailed(*key, failure.failure, str(failure)))
            raise failure

    def _find(self, hello: Hello, proof: bytes) -> _Expected:
        """The transfer that a hello names. Raises MoveError unless it is expected, and exactly as granted."""
        if not hmac.compare_digest(proof, hello.proof(self.token)):
            raise MoveError(
                Failure.REFUSED, "the token is not this receiver's: it has restarted, or is another"
            )
        one = self._expected.get((hello.sender, hello.id))
        if one is None or one.stopping is not None:
            known = "is coming in already" if one else "is not expected here"
            raise MoveError(Failure.REFUSED, f"transfer {hello.id} of {hello.sender} {known}")
        geometry = self.memory.geometry
        granted = (len(one.granted.pages), geometry.page_bytes, geometry.parts(one.granted.granularity))
        if (hello.pages, hello.page_bytes, hello.parts) != granted:
            raise MoveError(Failure.REFUSED, f"transfer {hello.id} is not what was granted: {hello}")
        return one

    async def _attempt(self, connection: Connection, one: _Expected) -> MoveError | None:
        """Receive a transfer; returns why it failed, or None.

        Cancellation stops it between two system calls.
        """
        failure: MoveError | None = None
        try:
            with connection.watched():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.keep_alive, wire.ALIVE)
                    failure = await self._receive_all(connection, one.granted)
                    nursery.cancel_scope.cancel()
        except MoveError as error:
            failure = error
        return failure

    async def _receive_all(self, connection: Connection, granted: Expect) -> MoveError | None:
        parts = self.memory.geometry.parts(granted.granularity)
        coverage = Coverage(len(granted.pages), parts)
        try:
            await connection.write([wire.ACCEPTED])
            while not coverage.complete:
                piece = await self._receive(connection, granted, coverage, parts)
                coverage.add(piece)
        except MoveError as error:
            return error
        return None

    async def _receive(
        self, connection: Connection, granted: Expect, coverage: Coverage, parts: int
    ) -> Piece:
        """Read one frame into its pages.

        A repeated one is written again: the pages are this transfer's alone.
        """
        header = await wire.read_header(connection)
        piece = header.piece
        if not coverage.holds(piece):
            raise MoveError(Failure.REFUSED, f"{piece} is not of transfer {granted.id}")
        views = _views(self.memory, piece, granted.pages, parts)
        await connection.read_into(views)
        if _checksum(views) != header.checksum:
            raise MoveError(Failure.CHECKSUM, f"{piece} of transfer {granted.id} arrived damaged")
        return piece


@attrs.frozen
class _Started:
    """Passes a task's start on, with the way as its value."""

    outer: trio.TaskStatus[Way]
    way: Way

    def started(self, _listeners: object = None) -> None:
        self.outer.started(self.way)


async def _say_why(connection: Connection, error: MoveError) -> None:
    """Tell the sender the reason before the connection ends, as far as LINGER_S allows."""
    with trio.move_on_after(LINGER_S):
        try:
            await connection.write([wire.encode_failure(error)])
            connection.socket.shutdown(trio.socket.SHUT_WR)
            while await connection.socket.recv(1 << 16):
                pass
        except (MoveError, OSError):
            pass  # the sender is gone


# ---- memory --------------------------------------------------------------------------------------------------


def _views(memory: Memory, piece: Piece, pages: tuple[int, ...], parts: int) -> list[memoryview]:
    """A piece's bytes in this process's arena, page by page."""
    found = spans(piece, pages, memory.geometry.page_bytes, parts)
    return [memory.view[start : start + nbytes] for start, nbytes in found]


def _checksum(views: list[memoryview]) -> int:
    """CRC-32 (zlib's) of the views' bytes in their order."""
    value = 0
    for view in views:
        value = zlib.crc32(view, value)
    return value
