"""MemPool as a program uses it: over real sockets and mapped memory, with every mistake that it can make."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from memserve.actors.mempool_shard import ShardSettings, make_core, open_shard
from memserve.client import MemPool, open_pool
from memserve.errors import PeerUnreachable, PoolError
from memserve.identity import ActorId
from memserve.mempool.addresses import Address, Parts, Tier, unpack
from memserve.mempool.addresses import pack as pack_address
from memserve.mempool.room import Capacity
from memserve.pool_messages import DescribePool
from memserve.tokens import pack

ROOT = Path(__file__).parents[1]
PAGE_TOKENS, PAGE_BYTES = 4, 4096
CODES = {name: value for name, value in vars(PoolError).items() if name.isupper()}


def sizes(number: int = 0, device: int = 8, host: int = 8, disk: int = 16, **more) -> ShardSettings:
    """Settings of a small shard that moves no pages by itself."""
    capacity = Capacity(device, host, disk, swap_low=0.0, swap_high=0.0)
    return ShardSettings(
        capacity=capacity, page_tokens=PAGE_TOKENS, page_bytes=PAGE_BYTES, number=number, **more
    )


@asynccontextmanager
async def one_shard(folder: Path, **more):
    """A shard and a pool over it."""
    settings = sizes(disk_dir=folder, **more)
    async with (
        open_shard("s0", folder, settings) as endpoint,
        open_pool("me", folder, {"s0": endpoint}) as pool,
    ):
        yield pool, endpoint


async def store(pool, tokens, shard="s0", tier=Tier.DEVICE):
    """Insert the pages of a prompt into the index, each filled with its first token."""
    lease = await pool.alloc_mem(len(tokens) // PAGE_TOKENS, shard, tier)
    for i, address in enumerate(lease.addresses):
        pool.write(address, bytes([tokens[i * PAGE_TOKENS]]) * PAGE_BYTES)
    await pool.insert(pack(tokens), lease.addresses)
    await pool.free_mem(lease)


async def refused(code, call, *arguments):
    """Make a call that must be refused with this code."""
    with pytest.raises(PoolError) as caught:
        answer = call(*arguments)
        if hasattr(answer, "__await__"):
            await answer
    assert caught.value.code == code, caught.value


def test_the_example_runs_as_it_is_documented():
    """The example in docs/mempool.md runs and prints what the page says."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "mempool.md").read_text(), re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" Parts") for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["s0 32 b's0s0'", "s1 b's1s1'", "s1 32 b's0s0'"]
    for (*_, parts), (shard, tier) in zip(lines, [(0, "DEVICE"), (1, "HOST"), (1, "DEVICE")], strict=True):
        assert f"shard={shard}" in parts and tier in parts


def test_every_code_and_call_is_documented():
    """docs/mempool.md lists every error code and every call."""
    page = (ROOT / "docs" / "mempool.md").read_text()
    assert not [code for code in CODES.values() if f"| `{code}` |" not in page]
    assert len(set(CODES.values())) == len(CODES)
    calls = {name for name in vars(MemPool) if not name.startswith("_")} - {"me"}
    assert not [call for call in calls if f"`{call}`" not in page.partition("## Calls")[2]]


async def test_what_one_program_stores_another_finds(folder: Path) -> None:
    """What one program inserts another finds and reads, but cannot write; another scope does not find it."""
    tokens = list(range(12))
    async with one_shard(folder) as (pool, endpoint):
        await store(pool, tokens)
        async with open_pool("other", folder, {"s0": endpoint}) as other:
            found = await other.match(pack([*tokens, 7]), "s0")
            assert found.cached_tokens == 12
            assert [bytes(other.read(one))[:2] for one in found.addresses] == [b"\0\0", b"\4\4", b"\x08\x08"]
            await refused(PoolError.RETIRED, other.write, found.addresses[0], b"x")
            grant = await other.acquire(pack([*tokens[:8], 9, 9]), 1, "s0")
            assert (grant.cached_tokens, len(grant.addresses)) == (8, 4)
            other.write(grant.addresses[2], b"mine")
            await refused(PoolError.RETIRED, other.write, grant.addresses[1], b"x")
        async with open_pool("me", folder, {"s0": endpoint}, scope="bob") as stranger:
            assert (await stranger.match(pack(tokens), "s0")).cached_tokens == 0


async def test_a_match_and_new_pages_make_a_longer_prompt(folder: Path) -> None:
    """The paper's sequence works: match, alloc_mem, then insert with the addresses of both."""
    tokens = list(range(16))
    async with one_shard(folder) as (pool, _):
        await store(pool, tokens[:8])
        found = await pool.match(pack(tokens), "s0")
        more = await pool.alloc_mem(3, "s0")
        assert await pool.insert(pack(tokens), [*found.addresses, *more.addresses[1:]]) == 8
        await refused(PoolError.RETIRED, pool.write, more.addresses[1], b"x")
        pool.write(more.addresses[0], b"still mine")
        assert (await pool.match(pack(tokens), "s0")).addresses == (*found.addresses, *more.addresses[1:])
        assert await pool.free_mem(more.addresses[:1]) == 1
        await pool.free_mem(more)
        assert await pool.delete(pack(tokens[:4]), "s0") == 0  # matches pin it


async def test_pages_go_down_and_come_back(folder: Path) -> None:
    """Pages keep their bytes when they are swapped out to host memory and disk and back."""
    tokens = list(range(16))
    async with one_shard(folder) as (pool, _):
        await store(pool, tokens)
        assert await pool.swap_out(2, "s0") == 2
        found = await pool.match(pack(tokens), "s0")
        assert [unpack(one).tier for one in found.addresses] == [0, 0, 1, 1]
        assert [pool.read(one)[9] for one in found.addresses] == [0, 4, 8, 12]
        there = await pool.swap_in(found)
        assert (there.id, [unpack(one).tier for one in there.addresses]) == (found.id, [0] * 4)
        await refused(PoolError.NOT_HELD, pool.read, found.addresses[3])
        assert [pool.read(one)[9] for one in there.addresses] == [0, 4, 8, 12]
        await pool.free_mem(there)
        assert await pool.swap_out(4, "s0") == 4
        assert await pool.swap_out(4, "s0", Tier.HOST) == 4
        back = await pool.match(pack(tokens), "s0")  # match loads pages from disk
        assert [(unpack(one).tier, pool.read(one)[9]) for one in back.addresses] == [
            (0, 0),
            (0, 4),
            (0, 8),
            (0, 12),
        ]
        await pool.free_mem(back)
        assert await pool.evict(3, "s0") == 3
        assert (await pool.match(pack(tokens), "s0")).cached_tokens == 4


async def test_a_prefetched_prefix_is_there_when_it_is_wanted(folder: Path) -> None:
    """A prefetched prefix is soon in the device tier."""
    async with one_shard(folder) as (pool, _):
        await store(pool, list(range(8)))
        await pool.swap_out(2, "s0")
        pool.prefetch(pack(range(8)), "s0")
        with trio.fail_after(5):
            while True:
                found = await pool.match(pack(range(8)), "s0")
                if not any(unpack(one).tier for one in found.addresses):
                    break
                await pool.free_mem(found)
                await trio.sleep(0.01)


async def test_every_misuse_has_its_code_and_changes_nothing(folder: Path) -> None:
    """Each misuse of a call is refused with its own code and changes nothing."""
    async with one_shard(folder) as (pool, endpoint):
        mine = await pool.alloc_mem(3, "s0")
        a, b, c = mine.addresses
        at = unpack(a)
        foreign = pack_address(Parts(5, at.incarnation, Tier.DEVICE, 0))
        stale = pack_address(Parts(0, at.incarnation ^ 1, Tier.DEVICE, at.page))
        beyond = pack_address(Parts(0, at.incarnation, Tier.DEVICE, 1000))
        page = pack(range(4))
        for address, code in [
            (foreign, PoolError.FOREIGN_ADDRESS),
            (stale, PoolError.STALE_ADDRESS),
            (beyond, PoolError.NOT_HELD),
            (Address(-1), PoolError.NOT_HELD),
            (Address(1 << 70), PoolError.NOT_HELD),
        ]:
            await refused(code, pool.free_mem, [address])
            await refused(code, pool.write, address, b"")
            await refused(code, pool.read, address)
            await refused(code, pool.insert, page, [address])
        await refused(PoolError.FOREIGN_ADDRESS, pool.insert, page * 2, [foreign, a])
        await refused(PoolError.NOT_HELD, pool.insert, page * 2, [a, a])
        await refused(PoolError.NOT_HELD, pool.insert, page * 2, [beyond, a])
        await refused(PoolError.NOT_WHOLE_PAGES, pool.insert, page[:8], [a])
        await refused(PoolError.DOES_NOT_FIT, pool.insert, page, [a, b])
        await refused(PoolError.DOES_NOT_FIT, pool.write, a, bytes(PAGE_BYTES), 1)
        await refused(PoolError.TOO_LARGE, pool.alloc_mem, 9, "s0")
        await refused(PoolError.NO_PAGES, pool.alloc_mem, 6, "s0")
        await refused(PoolError.BAD_COUNT, pool.alloc_mem, -1, "s0")
        await refused(PoolError.BAD_TIER, pool.alloc_mem, 1, "s0", Tier.DISK)
        await refused(PoolError.BAD_TIER, pool.evict, 1, "s0", 7)
        await refused(PoolError.BAD_TIER, pool.swap_out, 1, "s0", Tier.DISK)
        assert await pool.insert(page, [b]) == 0
        await refused(PoolError.TOKENS_CHANGED, pool.insert, pack([9] * 4), [b])
        await refused(PoolError.RETIRED, pool.free_mem, [b])
        await refused(PoolError.RETIRED, pool.write, b, b"x")
        assert await pool.free_mem([a]) == 1
        await refused(PoolError.NOT_HELD, pool.free_mem, [a])
        async with open_pool("other", folder, {"s0": endpoint}) as other:
            await refused(PoolError.NOT_HELD, other.free_mem, [c])
            await refused(PoolError.NOT_OWNER, other.free_mem, mine)
        assert await pool.free_mem(mine) == 1
        await refused(PoolError.UNKNOWN_LEASE, pool.free_mem, mine)
        await refused(PoolError.UNKNOWN_LEASE, pool.alloc_mem, 1, "s0", Tier.DEVICE, mine)
        everything = await pool.alloc_mem(7, "s0")  # all but the one in the index
        assert len(everything.addresses) == 7


async def test_a_caller_that_gives_up_holds_nothing(folder: Path) -> None:
    """An acquire that is cancelled while it waits holds no pages later."""
    async with one_shard(folder) as (pool, _):
        first = await pool.alloc_mem(6, "s0")
        with trio.move_on_after(0.1) as scope:
            await pool.acquire(pack(range(20)), 0, "s0")
        assert scope.cancelled_caught
        await pool.free_mem(first)
        assert len((await pool.alloc_mem(8, "s0")).addresses) == 8


async def test_a_cancelled_call_leaves_no_page_that_others_could_have(folder: Path) -> None:
    """Whether the shard has heard it or not: what is written or read afterwards would be another's."""
    async with one_shard(folder) as (pool, _):
        mine = await pool.alloc_mem(2, "s0")
        with trio.move_on_after(0):
            await pool.insert(pack(range(4)), mine.addresses[:1])
        await refused(PoolError.RETIRED, pool.write, mine.addresses[0], b"x")
        pool.write(mine.addresses[1], b"mine")
        with trio.move_on_after(0):
            await pool.free_mem(mine.addresses[1:])
        await refused(PoolError.NOT_HELD, pool.write, mine.addresses[1], b"x")
        with trio.move_on_after(0):
            await pool.free_mem(mine)
        await refused(PoolError.NOT_HELD, pool.read, mine.addresses[0])
        assert await pool.swap_out(1, "s0") == 1
        found = await pool.match(pack(range(4)), "s0")
        with trio.move_on_after(0):
            await pool.swap_in(found)
        await refused(PoolError.NOT_HELD, pool.read, found.addresses[0])
        assert len((await pool.acquire(pack(range(50, 82)), 0, "s0")).addresses) == 8


async def test_a_refused_insert_leaves_its_pages_to_be_written(folder: Path) -> None:
    """If it did not, a mistake would cost the program its pages."""
    async with one_shard(folder) as (pool, _):
        mine = await pool.alloc_mem(1, "s0")
        await refused(PoolError.NOT_WHOLE_PAGES, pool.insert, pack(range(3)), mine.addresses)
        pool.write(mine.addresses[0], b"x")


async def test_a_lease_that_grows_for_a_caller_that_gives_up_does_not_grow(folder: Path) -> None:
    """If it did, the program could not give back the pages: it never heard of them."""
    async with one_shard(folder) as (pool, _):
        mine = await pool.alloc_mem(2, "s0")
        with trio.move_on_after(0):
            await pool.alloc_mem(3, "s0", lease=mine)
        await pool.free_mem(mine.addresses)
        assert len((await pool.alloc_mem(8, "s0")).addresses) == 8


async def test_two_tasks_hold_the_same_prefix_each_for_itself(folder: Path) -> None:
    """If the first to give it back took it from the other, tasks of one program could not share a prompt."""
    async with one_shard(folder) as (pool, _):
        await store(pool, list(range(8)))
        assert await pool.swap_out(1, "s0") == 1
        one, other = [await pool.match(pack(range(8)), "s0") for _ in range(2)]
        await refused(PoolError.PINNED, pool.swap_in, one)
        await pool.free_mem(other)
        assert pool.read(one.addresses[1])[0] == 4
        there = await pool.swap_in(one)
        assert (there.id, pool.read(there.addresses[1])[0]) == (one.id, 4)


async def test_leases_that_a_program_must_forget_are_given_back(folder: Path) -> None:
    """A shard that slept keeps what a program that waited for it no longer dares to use: it would keep it for ever."""
    async with one_shard(folder) as (pool, _):
        mine = await pool.alloc_mem(8, "s0")
        pool._shards["s0"].valid_until = trio.current_time()  # as after a silence
        await pool.evict(0, "s0")
        await refused(PoolError.NOT_HELD, pool.write, mine.addresses[0], b"x")
        assert len((await pool.acquire(pack(range(32)), 0, "s0")).addresses) == 8


async def test_a_program_that_ends_or_dies_gives_back(folder: Path) -> None:
    """The leases of a killed program end, and its pages come free."""
    code = f"""
import sys, trio
from pathlib import Path
from memserve.client import MemPool, open_pool
async def main():
    async with open_pool("victim", Path({str(folder)!r}), {{"s0": sys.argv[1]}}) as pool:
        await pool.alloc_mem(8, "s0")
        print("ready", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""
    async with one_shard(folder, lease_s=2.0) as (pool, endpoint):
        victim = await trio.lowlevel.open_process(
            [sys.executable, "-c", code, endpoint], stdout=subprocess.PIPE
        )
        assert await victim.stdout.receive_some(5) == b"ready"
        await refused(PoolError.NO_PAGES, pool.alloc_mem, 1, "s0")
        victim.kill()
        await victim.wait()
        with trio.fail_after(10):
            got = await pool.acquire(pack(range(8 * PAGE_TOKENS)), 0, "s0")  # waits for the timer
        assert len(got.addresses) == 8


async def test_a_program_that_was_stopped_does_not_use_pages_that_others_have(folder: Path) -> None:
    """It tries before it has heard anything, and again after it has: its first calls must not revive its leases."""
    code = f"""
import sys, trio
from pathlib import Path
from memserve.client import open_pool
from memserve.errors import PoolError
def tried(call, *arguments):
    try:
        call(*arguments)
    except PoolError as error:
        return error.code
    return "done"
async def main():
    async with open_pool("victim", Path({str(folder)!r}), {{"s0": sys.argv[1]}}) as pool:
        mine = await pool.alloc_mem(8, "s0")
        print("ready", flush=True)
        sys.stdin.readline()  # it is stopped here, and its tasks with it
        for _ in range(2):
            print(tried(pool.write, mine.addresses[0], b"late"), tried(pool.read, mine.addresses[0]), flush=True)
            await pool.evict(0, "s0")
trio.run(main)
"""
    async with one_shard(folder, lease_s=2.0) as (pool, endpoint):
        victim = await trio.lowlevel.open_process(
            [sys.executable, "-c", code, endpoint], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert await victim.stdout.receive_some(5) == b"ready"
        victim.send_signal(signal.SIGSTOP)
        with trio.fail_after(10):
            got = await pool.acquire(pack(range(8 * PAGE_TOKENS)), 0, "s0")
        pool.write(got.addresses[0], b"others")
        victim.send_signal(signal.SIGCONT)
        await victim.stdin.send_all(b"\n")
        assert await victim.wait() == 0
        said = b"".join([chunk async for chunk in victim.stdout]).split()
        assert said == [b"not_held"] * 4
        assert bytes(pool.read(got.addresses[0])[:6]) == b"others"


async def test_an_error_within_a_pool_s_block_comes_out_as_it_is(folder: Path, monkeypatch) -> None:
    """Wrapped in groups of tasks that the program does not know of, no handler of its own would find it."""
    with pytest.raises(PoolError, match="bad_count"):
        async with one_shard(folder) as (pool, _):
            await pool.alloc_mem(-1, "s0")
    monkeypatch.setattr("memserve.client.calls.OPEN_S", 0.1)
    with pytest.raises(PeerUnreachable, match="s0"):
        async with open_pool("me", folder, {"s0": f"ipc://{folder}/nobody.sock"}):
            pass


async def test_a_shard_that_is_gone_is_said_to_be(folder: Path) -> None:
    """Calls to a shard that is gone raise PeerUnreachable instead of hanging."""
    life = trio.CancelScope()

    async def shard(task_status) -> None:
        with life:
            async with open_shard("s0", folder, sizes(disk=0, lease_s=1.0)) as endpoint:
                task_status.started(endpoint)
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        endpoint = await nursery.start(shard)
        async with open_pool("me", folder, {"s0": endpoint}) as pool:
            lease = await pool.alloc_mem(1, "s0")
            life.cancel()
            with pytest.raises(PeerUnreachable):
                await pool.match(pack(range(4)), "s0")
            await refused(PoolError.NOT_HELD, pool.write, lease.addresses[0], b"x")


def test_a_gpu_announces_no_memory_that_a_program_could_map() -> None:
    """If it did, a program that maps everything announced could not open a pool over a GPU's shard at all."""
    sockets = {Tier.DEVICE: Path("/run/d"), Tier.HOST: Path("/run/h")}
    for gpu, first in ((None, "/run/d"), (0, "")):
        core = make_core(ActorId("s0.1"), sizes(gpu=gpu), sockets, ())
        core.receive(ActorId("me.1"), DescribePool(1), 0.0)
        (answer,) = core.take()
        assert answer.message.arenas == (first, "/run/h", "")
