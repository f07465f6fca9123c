"""The wire format of a transfer's connection, and how both ends move bytes between sockets and arenas.

One connection carries one transfer: a cut ends that transfer and no other. ::

    sender -> receiver   hello (which proves the token), then frames: header + payload;
                         a header of 0 pages says "still here"
    receiver -> sender   A accepted, "." still here, then D done or F failed (failure and text), once

Everything but text is fixed-size little-endian. A payload is the bytes of one piece, page by page. Its header
contains their CRC-32.
"""

from __future__ import annotations

import errno
import hmac
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import attrs
import trio

from memserve.identity import ActorId
from memserve.transfer.mover import MoveError
from memserve.transfer.values import Piece
from memserve.transfer_messages import Failure

MAGIC = b"MEMSXFER"
VERSION = 2
TOKEN_BYTES = 32
PROOF_BYTES = 32
"""Size of an HMAC-SHA-256."""
SENDER_BYTES_MAX = 256
TEXT_BYTES_MAX = 1024
STALL_S = 3.0
"""A connection is cut when the other end sends nothing for this long. Each end sends three times as often."""
VIEWS_MAX = 512
"""Buffers in one system call; the kernel allows 1,024."""
FRAME_BYTES = 256 << 10
"""Longest payload, unless one page's part is longer: small enough that the checksum finds it in cache."""

_HELLO = struct.Struct(f"<8sI{PROOF_BYTES}sQIIQI")
_HEADER = struct.Struct("<IIII")
_TEXT = struct.Struct("<H")

ACCEPTED, ALIVE, DONE, FAILED = b"A", b".", b"D", b"F"


# ---- values --------------------------------------------------------------------------------------------------


@attrs.frozen
class Hello:
    """Who sends which transfer, and its size; the receiver must have granted exactly this.

    It does not carry the receiver's token but a proof of knowing it, valid for this transfer alone: an
    eavesdropper cannot use it to send another one.
    """

    sender: ActorId
    id: int
    pages: int
    page_bytes: int
    parts: int

    def encode(self, token: bytes) -> bytes:
        """The wire form, with the proof."""
        return self._packed(self.proof(token))

    def proof(self, token: bytes) -> bytes:
        """HMAC of this hello under ``token``."""
        return hmac.digest(token, self._packed(bytes(PROOF_BYTES)), "sha256")

    def _packed(self, proof: bytes) -> bytes:
        name = self.sender.encode()
        fixed = _HELLO.pack(
            MAGIC, VERSION, proof, self.id, self.pages, self.parts, self.page_bytes, len(name)
        )
        return fixed + name


async def read_hello(connection: Connection) -> tuple[Hello, bytes]:
    """Read a hello and its proof. Raises MoveError when the bytes are not a hello."""
    fixed = await connection.read(_HELLO.size)
    magic, version, proof, number, pages, parts, page_bytes, length = _HELLO.unpack(fixed)
    if magic != MAGIC or version != VERSION or length > SENDER_BYTES_MAX:
        raise MoveError(Failure.REFUSED, "not a transfer, or of another version")
    try:
        sender = ActorId((await connection.read(length)).decode())
    except UnicodeDecodeError as error:
        raise MoveError(Failure.REFUSED, "not a transfer: its sender's name is no text") from error
    return Hello(sender, number, pages, page_bytes, parts), proof


@attrs.frozen
class Header:
    """Announces a payload: a piece and the CRC-32 of its bytes. ``pages == 0`` only says "still here"."""

    piece: Piece
    checksum: int

    def encode(self) -> bytes:
        """The wire form."""
        return _HEADER.pack(self.piece.first, self.piece.pages, self.piece.part, self.checksum)


STILL_HERE = _HEADER.pack(0, 0, 0, 0)


async def read_header(connection: Connection) -> Header:
    """Read the next header that announces a payload."""
    while True:
        first, pages, part, checksum = _HEADER.unpack(await connection.read(_HEADER.size))
        if pages:
            return Header(Piece(first, pages, part), checksum)


def encode_failure(error: MoveError) -> bytes:
    """The wire form of a receiver's last message on a transfer that failed."""
    text = f"{error.failure} {error}".encode()[:TEXT_BYTES_MAX]
    return FAILED + _TEXT.pack(len(text)) + text


async def read_verdict(connection: Connection) -> bytes:
    """Read the receiver's next message but ALIVE: ACCEPTED or DONE.

    Raises MoveError with a failure it sends.
    """
    while (word := await connection.read(1)) == ALIVE:
        pass
    if word == FAILED:
        (length,) = _TEXT.unpack(await connection.read(_TEXT.size))
        failure, _, text = (await connection.read(length)).decode(errors="replace").partition(" ")
        raise MoveError({str(one): one for one in Failure}.get(failure, Failure.REFUSED), text)
    if word not in (ACCEPTED, DONE):
        raise MoveError(Failure.REFUSED, f"the receiver answered {word!r}")
    return word


# ---- connections ---------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Connection:
    """A watched socket: it counts as cut when no bytes have come in for STALL_S."""

    socket: trio.socket.SocketType
    watch: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _writing: trio.Lock = attrs.field(factory=trio.Lock, init=False)

    def __attrs_post_init__(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_S * 1000))
        self._heard()

    def _heard(self) -> None:
        self.watch.deadline = trio.current_time() + STALL_S

    async def read(self, nbytes: int) -> bytes:
        """Read exactly ``nbytes`` bytes. Raises MoveError when the connection ends before."""
        buffer = bytearray(nbytes)
        await self.read_into([memoryview(buffer)])
        return bytes(buffer)

    async def read_into(self, views: Sequence[memoryview]) -> None:
        """Fill every view straight from the socket. Raises MoveError when the connection ends before."""
        left = [view for view in views if view.nbytes]
        start = 0
        while start < len(left):
            with cut_means_cut():
                got, *_ = await self.socket.recvmsg_into(left[start : start + VIEWS_MAX])
            if not got:
                raise MoveError(Failure.CUT, "the other end closed the connection")
            self._heard()
            start = _consume(left, start, got)

    async def write(self, views: Sequence[bytes | memoryview]) -> None:
        """Send every view straight from its memory, with no other task's bytes in between."""
        left = [memoryview(view) for view in views if len(view)]
        async with self._writing:
            start = 0
            while start < len(left):
                with cut_means_cut():
                    sent = await self.socket.sendmsg(left[start : start + VIEWS_MAX])
                start = _consume(left, start, sent)

    async def keep_alive(self, word: bytes) -> None:
        """Send ``word`` often enough for the other end's watch, until cancelled or cut."""
        while True:
            await trio.sleep(STALL_S / 3)
            try:
                await self.write([word])
            except MoveError:
                return  # the task that reads finds out too

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this context, a silent other end raises MoveError(CUT)."""
        with self.watch:
            yield
        if self.watch.cancelled_caught:
            raise MoveError(Failure.CUT, f"nothing came from the other end for {STALL_S:g} s")


def _consume(views: list[memoryview], start: int, nbytes: int) -> int:
    """Take ``nbytes`` off the front of ``views[start:]``; returns the index where the rest begins."""
    while start < len(views) and nbytes >= views[start].nbytes:
        nbytes -= views[start].nbytes
        start += 1
    if nbytes:
        views[start] = views[start][nbytes:]
    return start


@contextmanager
def cut_means_cut() -> Iterator[None]:
    """Turn the kernel's errors about a broken connection into MoveError(CUT)."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        raise MoveError(Failure.CUT, f"the connection broke: {error.strerror or error} ({name})") from error
