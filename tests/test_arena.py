"""The arena between real processes: passed over a socket, sealed, and freed with its last user."""

import errno
import fcntl
import os
import resource
import socket
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import trio

import memserve
from memserve.errors import PeerError, PeerUnreachable, UserError
from memserve.kernels import arena as arenas
from memserve.kernels import memory
from memserve.kernels.arena import Arena, ArenaHeader, attach_arena, serve_arena

PAGES, PAGE_BYTES = 3, 5000  # an arena that does not end on a system page

OWNER = """
    import sys, trio
    from pathlib import Path
    from memserve.kernels.arena import Arena, serve_arena

    async def main():
        arena = Arena.create("kv.1", int(sys.argv[2]), int(sys.argv[3]))
        arena.memory[:5] = b"owner"
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_arena, arena, Path(sys.argv[1]))
            print("ready", flush=True)

    trio.run(main)
"""

READER = """
    import sys
    from pathlib import Path
    from memserve.kernels.arena import attach_arena

    arena = attach_arena(Path(sys.argv[1]), int(sys.argv[3]))
    arena.memory[-6:] = b"worker"
    print(bytes(arena.memory[:5]).decode(), flush=True)
"""


def python(script, *arguments):
    """Run ``script`` in its own process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(memserve.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)


@pytest.fixture
def place(tmp_path_factory):
    """A socket path short enough for the kernel."""
    return tmp_path_factory.mktemp("a") / "kv.sock"


@pytest.fixture
def owner(place):
    """A process that owns and serves an arena."""
    with python(OWNER, place, PAGES, PAGE_BYTES) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_what_one_process_writes_the_others_read(owner, place):
    """Processes that attach to an arena read and write the same memory."""
    arena = attach_arena(place, PAGE_BYTES)
    assert bytes(arena.memory[:5]) == b"owner"
    with python(READER, place, PAGES, PAGE_BYTES) as reader:
        assert reader.stdout.readline() == "owner\n"

    assert bytes(arena.memory[-6:]) == b"worker"
    assert arena.memory.nbytes == PAGES * PAGE_BYTES
    assert not arena.memory.readonly
    assert arena.header == ArenaHeader("kv.1", PAGES, PAGE_BYTES, 16384)
    arena.close()


def test_a_killed_owner_takes_nothing_away(owner, place):
    """When the owner is killed, the others can still use the memory, and attaching fails from then on."""
    arena = attach_arena(place, PAGE_BYTES)
    owner.kill()
    owner.wait()
    arena.memory[5:10] = b"alive"

    assert bytes(arena.memory[:10]) == b"owneralive"
    with pytest.raises(PeerUnreachable, match=str(place)):
        attach_arena(place, PAGE_BYTES)
    arena.close()


def test_nobody_can_shrink_or_grow_it(owner, place):
    """The arena is sealed: nobody can resize it, which would kill all others with SIGBUS."""
    arena = attach_arena(place, PAGE_BYTES)
    for size in (0, 4096, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    arena.close()


def test_a_worker_with_other_pages_is_refused(owner, place):
    """A worker with another page size is refused with the reason."""
    with pytest.raises(PeerError, match=r"have 5000 bytes, this worker's have 4096.*page_tokens"):
        attach_arena(place, 4096)


def test_closing_waits_for_wrappers():
    """Memory that something still refers to stays mapped after close."""
    arena = Arena.create("kv.1", 1, 4096)
    view = arena.memory
    arena.close()
    arena.close()
    view[:2] = b"ok"

    assert bytes(view[:2]) == b"ok"
    assert arena.fd == -1


def test_the_socket_lives_as_long_as_the_service(place):
    """The socket file exists, private to the user, as long as the service; its place cannot be taken twice."""

    async def main():
        arena = Arena.create("kv.1", PAGES, PAGE_BYTES)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_arena, arena, place)
            assert oct(place.stat().st_mode & 0o777) == "0o600"
            attached = await trio.to_thread.run_sync(attach_arena, place, PAGE_BYTES)
            attached.memory[0] = 7
            assert arena.memory[0] == 7
            attached.close()
            with pytest.raises(UserError, match="another shard"):
                await serve_arena(arena, place)
            with pytest.raises(UserError, match="too long"):
                await serve_arena(arena, place.with_name("x" * 120))
            nursery.cancel_scope.cancel()
        arena.close()

    trio.run(main)
    assert not place.exists()


def test_a_process_without_descriptors_serves_again_when_it_has_some(place):
    """If it gave up, every client's page would be lost because one moment brought too many connections."""

    async def main():
        arena = Arena.create("kv.1", PAGES, PAGE_BYTES)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_arena, arena, place)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
                try:
                    client.connect(str(place))
                    await trio.sleep(0.05)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                _, fds, *_ = await trio.to_thread.run_sync(socket.recv_fds, client, 4096, 1)
            os.close(fds[0])
            nursery.cancel_scope.cancel()
        arena.close()

    trio.run(main)


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.ENOBUFS, errno.ENFILE])
def test_a_shortage_of_the_system_passes(place, monkeypatch, error):
    """A moment without memory for one more connection would end the shard, and all of its pages with it."""
    failures = [OSError(error, os.strerror(error))]

    async def main():
        with trio.socket.socket() as some:
            kind, accept = type(some), type(some).accept

        async def scarce(listener):
            if failures:
                raise failures.pop()
            return await accept(listener)

        monkeypatch.setattr(kind, "accept", scarce)
        arena = Arena.create("kv.1", PAGES, PAGE_BYTES)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_arena, arena, place)
            worker = await trio.to_thread.run_sync(attach_arena, place, PAGE_BYTES)
            worker.close()
            nursery.cancel_scope.cancel()
        arena.close()

    trio.run(main)
    assert not failures


def test_another_user_gets_no_descriptor(place, monkeypatch):
    """A process of another user gets no descriptor, whatever the file modes are."""

    async def main():
        arena = Arena.create("kv.1", PAGES, PAGE_BYTES)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_arena, arena, place)
            monkeypatch.setattr(arenas, "_peer_uid", lambda connection: os.getuid() + 1)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
                stranger.connect(str(place))
                answer = await trio.to_thread.run_sync(socket.recv_fds, stranger, 4096, 1)
            with pytest.raises(PeerError, match="is served by user"):
                await trio.to_thread.run_sync(attach_arena, place, PAGE_BYTES)
            nursery.cancel_scope.cancel()
        assert answer[:2] == (b"", [])
        arena.close()

    trio.run(main)


@pytest.mark.parametrize(
    ("packet", "size", "seal", "complaint"),
    [
        (b"HTTP/1.1 200", 16384, True, "not an arena"),
        (struct.pack("<8sIIQQQ", arenas.MAGIC, 99, 0, 3, 5000, 16384), 16384, True, "layout version 99"),
        (ArenaHeader("kv.1", 4, 5000, 16384).encode(), 16384, True, "damaged"),
        (ArenaHeader("kv.1", 3, 5000, 16384).encode()[:-1], 16384, True, "damaged"),
        (ArenaHeader("kv.1", 3, 5000, 16384).encode(), 8192, True, "has 8192 bytes"),
        (ArenaHeader("kv.1", 3, 5000, 16384).encode(), 16384, False, "not sealed"),
        (ArenaHeader("kv.1", 3, 5000, 16384).encode(), None, True, "served no arena"),
    ],
)
def test_what_is_not_an_arena_is_refused(place, packet, size, seal, complaint):
    """Wrong, damaged or unsealed answers are refused, and their descriptors closed."""
    fds = []
    if size is not None:
        fds = [os.memfd_create("false", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
        os.ftruncate(fds[0], size)
        if seal:
            fcntl.fcntl(
                fds[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            )

    def serve(listener):
        connection, _ = listener.accept()
        with connection:
            socket.send_fds(connection, [packet], fds)

    async def main():
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(place))
            listener.listen()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, serve, listener)
                with pytest.raises(PeerError, match=complaint):
                    await trio.to_thread.run_sync(attach_arena, place, 5000)

    before = len(os.listdir("/proc/self/fd"))
    trio.run(main)
    assert len(os.listdir("/proc/self/fd")) <= before, "a refused descriptor was kept"
    for fd in fds:
        os.close(fd)


def test_too_big_an_arena_is_refused_by_name(monkeypatch):
    """An arena larger than the free memory is refused with the setting's name."""
    monkeypatch.setattr(arenas, "memory_available", lambda: 300 << 20)

    with pytest.raises(UserError, match=r"\[\[shard\]\] memory of 'kv' .* needs 1024 MiB, 300 MiB"):
        Arena.create("kv.1", 1 << 20, 1024)


def test_available_memory_is_at_most_the_machines():
    """Available memory is at most the machine's memory."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    assert 0 < memory.memory_available() <= total


def test_available_memory_is_limited_by_every_control_group_above(tmp_path):
    """The limits of all control groups above the process count, without their page cache."""
    inner = tmp_path / "pod" / "shard"
    inner.mkdir(parents=True)
    for group, limit, current, cache in (("pod", "1000", 900, 50), ("pod/shard", "max", 800, 0)):
        (tmp_path / group / "memory.max").write_text(f"{limit}\n")
        (tmp_path / group / "memory.current").write_text(f"{current}\n")
        (tmp_path / group / "memory.stat").write_text(f"anon 1\ninactive_file {cache}\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/pod/shard\n")

    assert list(memory._cgroup_rooms(membership, tmp_path)) == [150]
    membership.write_text("4:memory:/old\n")
    assert list(memory._cgroup_rooms(membership, tmp_path)) == []
