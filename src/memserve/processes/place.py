"""The runtime directory of one cluster, "the place": who may run here, its sockets, and who cleans up.

It has two locks. Both are ``flock`` locks, which the kernel drops however a process ends:

* *The claim* is an exclusive lock on the directory itself. The supervisor takes it, and every actor inherits
  the descriptor (one open file description). So it is free again only when the last process of the cluster is
  gone, and a second ``up`` never meets half of an older cluster.
* *The roll* is a shared lock on the file ``roll``, which each process takes for itself. A process that leaves
  tries to turn its share into an exclusive lock. A failed try gives up the share, too. So, however many
  processes leave in whatever order, exactly the last one succeeds. It removes all files still there,
  including sockets of killed processes.

Files are left over only if every process was killed at once; then the next claim removes them.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import attrs

from memserve.errors import UserError
from memserve.identity import ActorId, actor_name
from memserve.settings.rules import expanded, why_not_private

INFO_FILE = "cluster.json"
ROLL_FILE = "roll"

SOCKET_PATH_BYTES_MAX = 107
"""The ``sun_path`` of Linux is 108 bytes with its closing NUL (unix(7))."""
SOCKET_NAME_BYTES = 48
"""Room kept for ``/<name>.<8 hex>.arena`` when choosing the directory: any name (32 bytes) fits."""

_CLAIM_TRIES = 15
_CLAIM_PAUSE_S = 0.02


class PlaceGone(Exception):
    """The cluster of this directory has ended: there is nothing left to join."""


def place_path(log_dir: Path) -> Path:
    """The runtime directory for a cluster that logs to ``log_dir``.

    It is in ``$XDG_RUNTIME_DIR``, the temp directory or ``/tmp``: the first of these that is writable and
    short enough for socket paths. Raises UserError when none is.
    """
    for path in place_paths(log_dir):
        short_enough = len(os.fsencode(path)) + SOCKET_NAME_BYTES <= SOCKET_PATH_BYTES_MAX
        if short_enough and os.access(path.parent, os.W_OK | os.X_OK):
            return path
    bases = ", ".join(str(path.parent) for path in place_paths(log_dir))
    raise UserError(
        f"no directory for sockets: tried {bases}, but each is missing, not writable, or"
        f" longer than the {SOCKET_PATH_BYTES_MAX} bytes of a socket path allow. Set XDG_RUNTIME_DIR to a short,"
        " private directory."
    )


def place_paths(log_dir: Path) -> list[Path]:
    """Where the runtime directory may be, whatever the environment of the process that made it; the best first.

    A service, for example, has no ``$XDG_RUNTIME_DIR``, and a login has.
    """
    digest = hashlib.sha256(os.fsencode(expanded(log_dir, "logging.dir").resolve())).hexdigest()[:12]
    user = os.getuid()
    bases = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp", f"/run/user/{user}")
    found = (Path(base).absolute() / f"memserve-{user}-{digest}" for base in bases if base)
    return list(dict.fromkeys(found))


@attrs.define(eq=False)
class Place:
    """One process's hold on the runtime directory.

    Get it by :meth:`claim` or :meth:`join`, end it by :meth:`leave`.
    """

    path: Path
    _claim_fd: int | None
    """The claimed directory; None in an actor, whose inherited descriptor alone holds the claim."""
    _roll_fd: int

    @classmethod
    def claim(cls, log_dir: Path) -> Place:
        """Claim the place for a new cluster, and remove what a dead cluster left in it.

        Raises UserError when a cluster runs here or is still ending, or when the directory is not private.
        """
        path = place_path(log_dir)
        claim_fd = _claim_directory(path)
        try:
            for other in place_paths(log_dir):
                if other != path and _running(other) is not None:
                    raise UserError(_occupied(other))
            for stale in path.iterdir():
                _remove(stale)
            return cls(path, claim_fd, _sign_roll(path, os.O_CREAT | os.O_EXCL))
        except BaseException:
            os.close(claim_fd)
            raise

    @classmethod
    def join(cls, path: Path, claim_fd: int | None = None) -> Place:
        """Enter a claimed place as a process of its cluster. Raises PlaceGone when the cluster has ended.

        ``claim_fd``: the claim's descriptor, for a process that starts actors of its own for the cluster.
        """
        try:
            return cls(path, claim_fd, _sign_roll(path, 0))
        except (FileNotFoundError, BlockingIOError) as error:
            raise PlaceGone(f"{path} is gone: its cluster has ended") from error

    def fileno(self) -> int:
        """The claim's descriptor, for actors to inherit."""
        assert self._claim_fd is not None, "only a supervisor holds the claim"
        return self._claim_fd

    def write_info(self, info: dict[str, Any]) -> None:
        """Replace cluster.json atomically: a reader sees the old or the new file.

        It may hold keys, so it is private. Raises UserError when it cannot be written; the old file stays.
        """
        new = self.path / f"{INFO_FILE}.new"
        try:
            new.touch(mode=0o600)
            new.write_text(json.dumps(info))
            new.replace(self.path / INFO_FILE)
        except OSError as error:
            raise UserError(
                f"{self.path / INFO_FILE} cannot be written: {error.strerror}; make room, or set XDG_RUNTIME_DIR to"
                " another private directory"
            ) from error

    def read_info(self) -> dict[str, Any]:
        """The content of cluster.json. Raises PlaceGone when the cluster has ended."""
        info = _read_info(self.path)
        if info is None:
            raise PlaceGone(f"{self.path / INFO_FILE} is gone: its cluster has ended")
        return info

    def socket_path(self, name: str) -> Path:
        """The path of a socket or lock file called ``name``.

        Raises UserError when it is too long for a socket.
        """
        path = self.path / name
        size = len(os.fsencode(path))
        if size > SOCKET_PATH_BYTES_MAX:
            raise UserError(
                f"the socket path {path} has {size} bytes, and at most {SOCKET_PATH_BYTES_MAX} are possible:"
                " shorten the actor's name, or set XDG_RUNTIME_DIR to a shorter directory"
            )
        return path

    def endpoint(self, actor: str) -> str:
        """The ZeroMQ address of an actor's inbox; ``actor`` is its id, or a scheduler's well-known name."""
        return f"ipc://{self.socket_path(f'{actor}.sock')}"

    def remove_files_of(self, actor: ActorId) -> None:
        """Remove the sockets of an actor that is gone or about to go: its id's, and its well-known one."""
        well_known = f"{actor_name(actor)}.sock"
        for file in _entries(self.path):
            if file.name.startswith(f"{actor}.") or file.name == well_known:
                _remove(file)

    def leave(self, actor: ActorId | None = None) -> None:
        """Remove the caller's own files, and everything if the caller is the last process here.

        A second call does nothing.
        """
        if self._roll_fd < 0:
            return
        if actor is not None:
            self.remove_files_of(actor)
        if _try_lock(self._roll_fd, fcntl.LOCK_EX):
            for file in _entries(self.path):
                _remove(file)
            _remove_directory(self.path)
        os.close(self._roll_fd)
        self._roll_fd = -1
        if self._claim_fd is not None:
            os.close(self._claim_fd)
            self._claim_fd = None


def find_running(log_dir: Path) -> dict[str, Any] | None:
    """cluster.json of the cluster that logs to ``log_dir``; None if none has a living supervisor."""
    return next(filter(None, map(_running, place_paths(log_dir))), None)


def _running(path: Path) -> dict[str, Any] | None:
    """cluster.json of the cluster whose runtime directory is ``path``; None if it has no living supervisor."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(fd).st_uid != os.getuid() or _try_lock(fd, fcntl.LOCK_SH):
            return None
        info = _read_info(path)
    finally:
        os.close(fd)
    return info if info is not None and _alive(info["pid"]) else None


def now_utc() -> str:
    """The present time as cluster.json stores it: ISO 8601, UTC, whole seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


# ---- locks and files ----------------------------------------------------------------------------------------


def _claim_directory(path: Path) -> int:
    """Make and lock the directory; its descriptor.

    Retries cover ``status``, which tests the lock for an instant.
    """
    for _ in range(_CLAIM_TRIES):
        fd = _open_directory(path)
        if not _try_lock(fd, fcntl.LOCK_EX):
            os.close(fd)
            time.sleep(_CLAIM_PAUSE_S)
        elif _is_still(path, fd):
            return fd
        else:  # the last process of the old cluster removed the directory between our open and our lock
            os.close(fd)
    raise UserError(_occupied(path))


def _open_directory(path: Path) -> int:
    """Open the directory, making it if needed.

    Raises UserError unless it is the caller's own and closed to all others.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"cannot make the runtime directory {path}: {error.strerror}") from error
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return _open_directory(path)  # the last process of the old cluster has just removed it
    except OSError as error:
        raise UserError(f"{path} is in the way: it is not a directory of this user; remove it") from error
    if why := why_not_private(os.fstat(fd), 0o700):
        os.close(fd)
        raise UserError(
            f"the runtime directory {path} {why}; remove it, or set XDG_RUNTIME_DIR to a directory of your own"
        )
    return fd


def _is_still(path: Path, fd: int) -> bool:
    """Whether ``path`` still leads to the open directory ``fd``."""
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _sign_roll(path: Path, flags: int) -> int:
    """Take a share of the roll.

    Raises FileNotFoundError or BlockingIOError when the last process is leaving or gone.
    """
    fd = os.open(path / ROLL_FILE, os.O_RDWR | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # Locked but unlinked: the cleaner ran between our open and our lock. Still linked: no cleaner can
        # overtake us.
        if os.fstat(fd).st_nlink == 0:
            raise FileNotFoundError(path / ROLL_FILE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _try_lock(fd: int, kind: int) -> bool:
    """Take the lock without waiting; whether it was free."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _occupied(path: Path) -> str:
    """Why the place cannot be claimed, and what to do about it."""
    info = _read_info(path)
    if info is None:
        return f"another memserve is starting or still shutting down here (runtime directory {path}); try again in a moment"
    if info.get("state") == "draining" or not _alive(info["pid"]):
        return f"the previous memserve here is still shutting down (runtime directory {path}); try again in a moment"
    url = info.get("url") or f"still {info.get('state', 'starting')}"
    return (
        f"memserve already runs here: pid {info['pid']}, {url}, since {info['started_at']};"
        f" stop it with `kill {info['pid']}`, or choose another [logging] dir"
    )


def _alive(pid: int) -> bool:
    """Whether a process with this pid exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read_info(path: Path) -> dict[str, Any] | None:
    try:
        info: dict[str, Any] = json.loads((path / INFO_FILE).read_text())
    except FileNotFoundError:
        return None
    return info


def _entries(path: Path) -> list[Path]:
    """The files of a directory that may be gone.

    None without a descriptor to read it: what stays then is removed with the place, or by the next cluster.
    """
    try:
        return list(path.iterdir())
    except OSError:
        return []


def _remove(path: Path) -> None:
    """Remove a file or socket; another process may have removed it already."""
    path.unlink(missing_ok=True)


def _remove_directory(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        pass  # a process that was just starting put a socket here; it removes both when it leaves
