"""A cluster of several hosts as seen by one: its own address, the scheduler's, and the key that all share.

Whoever has the key is in the cluster. Actors talk over TCP, encrypted and authenticated with CURVE: every
inbox is a CURVE server and every sender a client, all with the same key pair. It is in a file that only its
owner can read, made by `memserve key` and copied to the other hosts by hand.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import socket
import stat
from pathlib import Path

import attrs

from memserve.errors import UserError
from memserve.settings.rules import expanded, why_not_private
from memserve.settings.sections import ClusterConfig

KEY_LINE = re.compile(r"memserve-cluster-key ([0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40})\n?")
"""The secret half of the key pair in Z85; the public half follows from it."""
KEY_BYTES_MAX = 1024


@attrs.frozen
class KeyPair:
    """A cluster's CURVE keys, in Z85."""

    public: str
    secret: str = attrs.field(repr=False)


@attrs.frozen
class HostNetwork:
    """How actors of this host and of other hosts reach one another."""

    address: str
    """This host's IP address, at which other hosts reach it."""
    head: str
    """The scheduler's endpoint."""
    joins: bool
    """Whether the scheduler is on another host."""
    keys: KeyPair

    @property
    def inbox(self) -> str:
        """The endpoint that an actor of this host binds; the system chooses a free port."""
        return endpoint(self.address, "*")

    @property
    def suffix(self) -> str:
        """The suffix that distinguishes this host's Frontends by name; empty on the scheduler's host."""
        return "-" + re.sub("[.:]+", "-", self.address).strip("-") if self.joins else ""


def endpoint(address: str, port: int | str) -> str:
    """The ZeroMQ endpoint for a port of an IP address."""
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


def find_network(config: ClusterConfig) -> HostNetwork | None:
    """The configured network; None for a single host.

    Raises UserError when this machine cannot be part of it.
    """
    if not config.networked:
        return None
    head, port = split_host_port(config.listen or config.join)
    keys = read_key(expanded(config.key, "cluster.key"))
    if config.listen:
        address = own_address(head, "cluster.listen", int(port))
        return HostNetwork(address, endpoint(address, port), False, keys)
    address = own_address(config.address, "cluster.address")
    return HostNetwork(address, endpoint(resolved_name(head, "cluster.join"), port), True, keys)


def split_host_port(text: str) -> tuple[str, str]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), port


def resolved_name(host: str, key: str) -> str:
    """The first IP address of a host name. Raises UserError that names ``key``."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as error:
        raise UserError(f"{key}: {host!r} cannot be resolved: {error.strerror}") from error


def own_address(host: str, key: str, port: int = 0) -> str:
    """The IP address of ``host``. Raises UserError unless it is this machine's and ``port`` is free there."""
    address = resolved_name(host, key)
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        raise UserError(
            f"{key}: {host!r} means every address: give the one at which the other hosts reach this one"
        )
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen()
        except OSError as error:
            raise UserError(_why_not_bound(key, host, port, error)) from error
    return address


def _why_not_bound(key: str, host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"{key}: port {port} of {host} is in use already; stop the process that uses it, or choose another port on all hosts"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{key}: {host} is not an address of this machine; `ip address` lists its addresses"
    return f"{key}: cannot listen on {host}, port {port}: {error.strerror}"


# ---- the key's file ------------------------------------------------------------------------------------------


def make_key(path: Path) -> None:
    """Write a new key to a new file. Raises UserError if it exists or cannot be written."""
    import zmq

    _, secret = zmq.curve_keypair()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UserError(
            f"{path} exists: it may be the key of a cluster; to replace it, remove it first"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(fd, "wb") as file:
            os.fchmod(fd, 0o600)
            file.write(b"memserve-cluster-key " + secret + b"\n")
    except OSError as error:
        path.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def read_key(path: Path) -> KeyPair:
    """The keys from a file that only its owner can access. Raises UserError with a remedy."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise UserError(
            f"cluster.key: {path} does not exist: make it on one host with `memserve key {path}`, and copy it to the others"
        ) from error
    except OSError as error:
        raise UserError(f"cluster.key: {path} cannot be read: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"cluster.key: {path} is not a file")
        if why := why_not_private(found, 0o600):
            raise UserError(f"cluster.key: {path} {why}: whoever can read it can join the cluster")
        return _parse_key(path, file.read(KEY_BYTES_MAX))


def _parse_key(path: Path, text: bytes) -> KeyPair:
    import zmq

    with contextlib.suppress(UnicodeDecodeError, zmq.ZMQError, ValueError):
        if match := KEY_LINE.fullmatch(text.decode("ascii")):
            return KeyPair(zmq.curve_public(match[1].encode()).decode(), match[1])
    raise UserError(f"cluster.key: {path} does not contain a cluster's key; make one with `memserve key`")
