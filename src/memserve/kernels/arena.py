"""The arena: one shard's KV pages as a sealed memfd that the shard creates and its workers map.

Lifetime: the kernel frees the memory once its last descriptor and its last mapping are gone, however the
processes ended. A killed shard leaves nothing behind, and its workers' mappings stay valid until they let go.
The memfd is sealed, so it cannot shrink under a reader: a mapping never faults with SIGBUS.

The descriptor travels over a Unix socket (SCM_RIGHTS) to processes of the same user, in one packet with an
:class:`ArenaHeader`. Nothing here interprets the bytes: a page is ``page_bytes`` bytes, laid out by the
engine as ``[layers, 2, kv_heads, page_tokens, head_dim]``.
"""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs
import trio

from memserve.accepting import accepted
from memserve.errors import PeerError, PeerUnreachable, UserError
from memserve.identity import ActorId
from memserve.kernels.mapping import Mapping, map_shared
from memserve.kernels.memory import memory_available, too_few_addresses

MAGIC = b"MEMSARNA"
LAYOUT_VERSION = 1
"""Version of the page layout; to be raised whenever the meaning of a page's bytes changes."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_FIXED = struct.Struct("<8sIIQQQ")
_UCRED = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""
_HANDSHAKE_S = 1.0
_HEADROOM_BYTES = 64 << 20
"""Bytes that must stay available to the system after the arena is allocated."""


@attrs.frozen
class ArenaHeader:
    """Facts on which an attaching process must agree before it maps anything."""

    shard: ActorId
    pages: int
    page_bytes: int
    size: int
    """Size of the memfd in bytes: all pages, rounded up to the system's page size."""

    def encode(self) -> bytes:
        """The header as sent along with the descriptor."""
        shard = self.shard.encode()
        return _FIXED.pack(MAGIC, LAYOUT_VERSION, len(shard), self.pages, self.page_bytes, self.size) + shard

    @classmethod
    def decode(cls, packet: bytes) -> ArenaHeader:
        """Decode a header. Raises PeerError if ``packet`` is not one, or has another layout version."""
        if len(packet) < _FIXED.size or not packet.startswith(MAGIC):
            raise PeerError(f"not an arena: the socket answered {packet[:16]!r}")
        _, version, length, pages, page_bytes, size = _FIXED.unpack_from(packet)
        if version != LAYOUT_VERSION:
            raise PeerError(
                f"the arena has page layout version {version}, this process needs {LAYOUT_VERSION}"
            )
        shard = packet[_FIXED.size :]
        if len(shard) != length or pages * page_bytes > size:
            raise PeerError(f"the arena's header is damaged: {packet!r}")
        return cls(ActorId(shard.decode()), pages, page_bytes, size)


@attrs.define(eq=False)
class Arena:
    """A mapped arena.

    Made by :meth:`create` (the shard) or :func:`attach_arena` (a worker); its maker must close it.
    """

    header: ArenaHeader
    fd: int
    _mapping: Mapping | None
    huge_bytes: int = 0
    """Bytes of the arena in huge pages; known only to the process that created it."""

    @classmethod
    def create(cls, shard: ActorId, pages: int, page_bytes: int) -> Arena:
        """Allocate, seal and prefault an arena. Takes up to a few seconds a GiB: call it off the event loop.

        Raises UserError when the machine has not enough memory.
        """
        assert pages > 0, f"an arena of {pages} pages"
        assert page_bytes > 0, f"pages of {page_bytes} bytes"
        size = -(-pages * page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        check_memory(shard, size)
        fd = os.memfd_create(f"memserve-{shard}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            mapping = map_shared(fd, size, writable=True)
            # Prefault everything now: later, the first touch of each page would slow a step by a fault, or
            # kill the process for lack of memory.
            huge = mapping.make_huge(fd)
            os.posix_fallocate(fd, 0, size)
            mapping.populate()
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ENOMEM, errno.ENOSPC):
                raise _too_little(shard, size, memory_available()) from error
            raise
        return cls(ArenaHeader(shard, pages, page_bytes, size), fd, mapping, huge)

    @property
    def memory(self) -> memoryview:
        """All pages, writable, ``pages * page_bytes`` bytes; page ``i`` starts at ``i * page_bytes``.

        The first byte is aligned to a huge page. Wrap the view without copying, e.g. with
        ``torch.frombuffer``; every wrapper keeps the mapping alive.
        """
        assert self._mapping is not None, "the arena is closed"
        return self._mapping.view[: self.header.pages * self.header.page_bytes]

    def close(self) -> None:
        """Let go of descriptor and mapping; wrappers of :attr:`memory` keep the mapping alive."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._mapping = None


# ---- memory ------------------------------------------------------------------------------------------------


def check_memory(shard: ActorId, size: int) -> None:
    """Raise UserError if ``size`` bytes are more than the machine (or this container) can provide now."""
    available = memory_available()
    if size + _HEADROOM_BYTES > available:
        raise _too_little(shard, size, available)


def _too_little(shard: ActorId, size: int, available: int) -> UserError:
    if size + _HEADROOM_BYTES <= available and (limited := too_few_addresses()):
        return UserError(limited)
    return UserError(
        f"[[shard]] memory of {shard.rpartition('.')[0]!r} is too much for this machine: the arena needs "
        f"{size >> 20} MiB, {available >> 20} MiB are available, and {_HEADROOM_BYTES >> 20} MiB stay free. "
        "Set a smaller memory, or stop something else."
    )


# ---- handing it out ----------------------------------------------------------------------------------------


async def serve_arena(
    arena: Arena,
    socket_path: Path,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hand the arena's descriptor to every process of this user that connects, until cancelled.

    The socket file is made before ``started()`` and removed at the end. Raises UserError if its path is taken
    or too long for a socket.
    """
    await serve_packet(arena.header.encode(), [arena.fd], socket_path, task_status=task_status)


async def serve_packet(
    packet: bytes,
    fds: Sequence[int],
    socket_path: Path,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hand ``packet`` and ``fds`` to every process of this user that connects; see :func:`serve_arena`."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        await _bind(listener, socket_path)
        try:
            listener.listen(128)
            task_status.started()
            while True:
                connection, _ = await accepted(listener.accept)
                with connection:
                    if _peer_uid(connection) == os.getuid():
                        await _send_packet(connection, packet, rights)
        finally:
            os.unlink(socket_path)


async def _bind(listener: trio.socket.SocketType, path: Path) -> None:
    try:
        await listener.bind(str(path))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{path} exists: another shard serves its arena there") from error
        if "too long" in str(error):
            raise UserError(
                f"{path} is too long for a socket's address: use a shorter runtime directory"
            ) from error
        raise
    os.chmod(path, 0o600)


async def _send_packet(
    connection: trio.socket.SocketType, packet: bytes, rights: list[tuple[int, int, bytes]]
) -> None:
    """Send to a new connection, whose buffer the packet fits; a peer gets ``_HANDSHAKE_S`` at most."""
    try:
        with trio.move_on_after(_HANDSHAKE_S):
            await connection.sendmsg([packet], rights)
    except OSError:
        pass  # the peer left before it was served; it may connect again


def attach_arena(socket_path: Path, page_bytes: int, *, timeout_s: float = 5.0) -> Arena:
    """Map the arena served at ``socket_path``. Blocks for up to ``timeout_s``: call it off the event loop.

    Raises PeerUnreachable if no process serves it, and PeerError if what is served is not a sealed arena with
    pages of ``page_bytes`` bytes.
    """
    packet, fds = receive_packet(socket_path, timeout_s)
    if not fds:
        raise PeerError(f"{socket_path} served no arena: {packet[:64]!r}")
    fd = fds[0]
    try:
        header = ArenaHeader.decode(packet)
        _validate(header, fd, page_bytes)
        mapping = map_shared(fd, header.size, writable=True)
        mapping.populate()
    except BaseException:
        os.close(fd)
        raise
    return Arena(header, fd, mapping)


def receive_packet(path: Path, timeout_s: float) -> tuple[bytes, list[int]]:
    """The packet served at ``path``, and the descriptors sent with it, which the caller must close.

    Raises PeerUnreachable if no process serves it, PeerError if another user's process does.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(timeout_s)
        with _unreachable(path):
            connection.connect(str(path))
            uid = _peer_uid(connection)
            if uid != os.getuid():
                raise PeerError(f"{path} is served by user {uid}, not by {os.getuid()}")
            packet, fds, _, _ = socket.recv_fds(connection, 4096, 1, socket.MSG_CMSG_CLOEXEC)
    return packet, fds


@contextmanager
def _unreachable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PeerUnreachable(f"no arena at {path}: {error.strerror or error}") from error


def _peer_uid(connection: socket.socket | trio.socket.SocketType) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid: int = _UCRED.unpack(credentials)[1]
    return uid


def _validate(header: ArenaHeader, fd: int, page_bytes: int) -> None:
    actual = os.fstat(fd).st_size
    if actual != header.size:
        raise PeerError(f"the arena of {header.shard} has {actual} bytes, its header says {header.size}")
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if seals & _SEALS != _SEALS:
        raise PeerError(f"the arena of {header.shard} is not sealed: it could shrink under its readers")
    if header.page_bytes != page_bytes:
        raise PeerError(
            f"pages of {header.shard} have {header.page_bytes} bytes, this worker's have {page_bytes}: "
            "both must run the same [model] path and dtype and the same [pool] page_tokens"
        )
