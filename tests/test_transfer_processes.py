"""Transfers between real processes that are killed in the middle, and between two hosts whose link goes down."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import attrs
import pytest
import trio

import memserve
from memserve.client import open_pool
from memserve.errors import PoolError
from memserve.tokens import pack

HOST = Path(__file__).with_name("transfer_host.py")
LAYERS, PAGES = 8, 32
DEADLINE_S = 8.0
"""The deadline of the transfers in these tests."""
SLACK_S = 8.0
"""Added to limits, for a busy machine."""
WATCHDOG_S = 60.0


@attrs.define(eq=False)
class Process:
    """A shard process of tests/transfer_host.py, and its output."""

    id: str
    process: subprocess.Popen
    port: int = 0

    def command(self, *words):
        """Send it a command."""
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def wait_for(self, event):
        """The next line about ``event``, skipping others."""
        for line in self.process.stdout:
            said = json.loads(line)
            if said["event"] == event:
                return said
        raise AssertionError(f"{self.id} ended before it said {event!r}")

    def kill(self):
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def started(actor, path, address, peer="", prefix=()):
    """A process that is killed at the end of the block."""
    environment = {**os.environ, "PYTHONPATH": str(Path(memserve.__file__).parents[1])}
    command = [
        *prefix,
        sys.executable,
        str(HOST),
        *actor.split("."),
        path,
        address,
        *([peer] if peer else []),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        watchdog = threading.Timer(WATCHDOG_S, process.kill)  # so that no test waits for ever
        watchdog.start()
        try:
            one = Process(actor, process)
            one.port = one.wait_for("ready")["port"]
            yield one
        finally:
            watchdog.cancel()
            process.kill()


@contextlib.contextmanager
def two(path, hosts=("127.0.0.1", "127.0.0.1"), prefixes=((), ())):
    """A sender and a receiver."""
    with started("b.1", path, f"{hosts[1]}:0", prefix=prefixes[1]) as receiver:
        peer = f"b.1@{hosts[1]}:{receiver.port}"
        with started("a.1", path, f"{hosts[0]}:0", peer, prefix=prefixes[0]) as sender:
            yield sender, receiver


def half_way(sender, receiver):
    """Begin a transfer and send half of its layers; returns the time by which it must have ended."""
    until = time.monotonic() + DEADLINE_S + SLACK_S
    sender.command("send", 1, PAGES, DEADLINE_S, receiver.id)
    sender.command("layers", 1, 0, LAYERS // 2, PAGES)
    receiver.wait_for("half")
    return until


@pytest.mark.parametrize("path", ["mapped", "tcp"])
def test_it_arrives_between_processes(path):
    """A transfer between two processes arrives whole."""
    with two(path) as (sender, receiver):
        half_way(sender, receiver)
        sender.command("layers", 1, LAYERS // 2, LAYERS, PAGES)
        assert receiver.wait_for("commit")["whole"]
        assert sender.wait_for("report")["failure"] is None


@pytest.mark.parametrize("path", ["mapped", "tcp"])
def test_a_sender_killed_in_the_middle(path):
    """When a sender is killed in the middle, the receiver frees the pages and inserts nothing."""
    with two(path) as (sender, receiver):
        until = half_way(sender, receiver)
        sender.kill()
        if path == "mapped":  # no connection breaks: the scheduler announces it
            receiver.command("gone", sender.id)
        released = receiver.wait_for("release")
        assert released["free"] == 64 and time.monotonic() < until
        assert receiver.wait_for("refused")["failure"] == ("peer_gone" if path == "mapped" else "cut")


def test_a_sender_that_sleeps_is_ended_before_its_pages_are_used_again():
    """A stopped sender is killed before the pages that it maps are freed: it could wake up and write to them."""
    with two("mapped") as (sender, receiver):
        half_way(sender, receiver)
        os.kill(sender.process.pid, signal.SIGSTOP)
        receiver.command("gone", sender.id)
        assert receiver.wait_for("release")["free"] == 64
        assert sender.process.wait(SLACK_S) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("path", "announced", "failure"),
    [("mapped", True, "peer_gone"), ("mapped", False, "deadline"), ("tcp", False, "cut")],
)
def test_a_receiver_killed_in_the_middle(path, announced, failure):
    """When a receiver is killed in the middle, the sender reports a failure in time."""
    with two(path) as (sender, receiver):
        until = half_way(sender, receiver)
        receiver.kill()
        sender.command("layers", 1, LAYERS // 2, LAYERS, PAGES)
        if announced:
            sender.command("gone", receiver.id)
        assert sender.wait_for("report")["failure"] == failure
        assert time.monotonic() < until


# ---- two hosts -----------------------------------------------------------------------------------------------


def ip(*words, check=True):
    """Run iproute2's ``ip``."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


@pytest.fixture
def hosts():
    """Two network namespaces with a link between them: a name, an address and a command prefix each."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"memserve-{os.getpid()}-{side}" for side in "ab"]
    links = [f"ms{os.getpid()}{side}" for side in "ab"]
    try:
        if ip("netns", "add", names[0], check=False).returncode:
            pytest.skip("this kernel or container allows no network namespaces")
        ip("netns", "add", names[1])
        ip(
            "link",
            "add",
            links[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            links[1],
            "netns",
            names[1],
        )
        for i, (name, link) in enumerate(zip(names, links, strict=True)):
            ip("-n", name, "address", "add", f"10.117.0.{i + 1}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names, links
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def between(hosts):
    """A sender on one host and a receiver on the other."""
    prefixes = [("ip", "netns", "exec", name) for name in hosts[0]]
    return two("tcp", ("10.117.0.1", "10.117.0.2"), prefixes)


def test_it_arrives_between_two_hosts(hosts):
    """A transfer between two hosts arrives whole."""
    with between(hosts) as (sender, receiver):
        half_way(sender, receiver)
        sender.command("layers", 1, LAYERS // 2, LAYERS, PAGES)
        assert receiver.wait_for("commit")["whole"]
        assert sender.wait_for("report")["failure"] is None


@pytest.mark.parametrize("side", [0, 1])
def test_the_link_goes_down_in_the_middle(hosts, side):
    """When the link goes down in the middle, both sides report a cut in time, and the receiver frees the pages."""
    names, links = hosts
    with between(hosts) as (sender, receiver):
        until = half_way(sender, receiver)
        ip("-n", names[side], "link", "set", links[side], "down")
        sender.command("layers", 1, LAYERS // 2, LAYERS, PAGES)
        assert sender.wait_for("report")["failure"] == "cut"
        assert receiver.wait_for("release")["free"] == 64
        assert receiver.wait_for("refused")["failure"] == "cut"
        assert time.monotonic() < until


# ---- two shards ----------------------------------------------------------------------------------------------

SHARD = """
import sys, trio
from pathlib import Path
from memserve.actors.mempool_shard import ShardSettings, open_shard
from memserve.mempool.room import Capacity
from memserve.transfer.settings import TransferSettings
async def main(name, folder, number, host, pages, page_bytes):
    settings = ShardSettings(
        capacity=Capacity(int(pages)), page_tokens=4, page_bytes=int(page_bytes), number=int(number),
        transfer=TransferSettings(path="tcp", host=host),
    )
    async with open_shard(name, Path(folder), settings) as endpoint:
        print(endpoint, flush=True)
        await trio.sleep_forever()
trio.run(main, *sys.argv[1:])
"""
SHARD_PAGES, PAGE_BYTES = 32, 65_536


@contextlib.contextmanager
def shards_on(hosts, folder):
    """A shard on each host; yields their endpoints. Messages go through the file system, pages over the link."""
    running, endpoints = [], {}
    try:
        for i, name in enumerate(hosts[0]):
            words = (f"s{i}", folder, i, f"10.117.0.{i + 1}", SHARD_PAGES, PAGE_BYTES)
            command = ["ip", "netns", "exec", name, sys.executable, "-c", SHARD, *map(str, words)]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for i, one in enumerate(running):
            endpoints[f"s{i}"] = one.stdout.readline().strip()
        yield endpoints
    finally:
        for one in running:
            one.kill()
            one.communicate()


async def soon(transfer):
    """Repeat until it succeeds: a link that was put up again takes a moment."""
    with trio.fail_after(DEADLINE_S + SLACK_S):
        while True:
            try:
                return await transfer()
            except PoolError as error:
                if error.code != PoolError.PEER_GONE:
                    raise
                await trio.sleep(0.1)


async def test_a_cable_pulled_between_two_shards(hosts, folder):
    """The link goes down when half of the pages are there: an error, no match, no page lost, and later transfers work."""
    names, links = hosts
    slow = (
        "tc",
        "qdisc",
        "add",
        "dev",
        links[0],
        "root",
        "tbf",
        "rate",
        "50mbit",
        "burst",
        "64kb",
        "latency",
        "1s",
    )
    if ip("netns", "exec", names[0], *slow, check=False).returncode:
        pytest.skip("this kernel cannot slow a link down")
    tokens = pack(range(4 * SHARD_PAGES))
    with shards_on(hosts, folder) as endpoints:
        async with open_pool("me", folder, endpoints) as pool:
            mine, there = await pool.alloc_mem(SHARD_PAGES, "s0"), await pool.alloc_mem(SHARD_PAGES, "s1")
            for address in mine.addresses:
                pool.write(address, b"k" * PAGE_BYTES)
            async with trio.open_nursery() as nursery:

                async def cut() -> None:
                    while pool.read(there.addresses[2])[0] != ord("k"):
                        await trio.sleep(0.005)
                    ip("-n", names[1], "link", "set", links[1], "down")
                    assert pool.read(there.addresses[-1])[-1] == 0, "it had arrived already"

                nursery.start_soon(cut)
                with pytest.raises(PoolError, match="cut"):
                    await pool.transfer_with_insert(
                        "s1", tokens, mine.addresses, there.addresses, deadline_s=DEADLINE_S
                    )
            with pytest.raises(PoolError, match="moving"):
                pool.write(there.addresses[0], b"x")
            await pool.free_mem(there)
            ip("-n", names[1], "link", "set", links[1], "up")
            with trio.fail_after(DEADLINE_S + SLACK_S):
                again = await pool.acquire(tokens, 0, "s1")  # waits until nobody fills these pages any more
            assert (again.cached_tokens, len(again.addresses)) == (0, SHARD_PAGES)
            await pool.free_mem(again)
            sent = await soon(lambda: pool.transfer_with_insert("s1", tokens, mine.addresses))
            assert all(bytes(pool.read(one)) == b"k" * PAGE_BYTES for one in sent.addresses)
