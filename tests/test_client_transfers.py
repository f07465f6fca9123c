"""``transfer`` and ``transfer_with_insert`` as a program uses them: two shards with real movers, and every mistake."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from memserve.actors.mempool_shard import ShardSettings, open_shard
from memserve.bus import FRAME_BYTES_MAX
from memserve.client import open_pool
from memserve.errors import PoolError
from memserve.mempool.addresses import Parts, Tier, unpack
from memserve.mempool.addresses import pack as pack_address
from memserve.mempool.room import Capacity
from memserve.pool_messages import PRIVATE_BYTES_MAX, FreeMem, Transfer
from memserve.tokens import pack
from memserve.transfer.settings import TransferSettings
from memserve.transfer_messages import Granularity
from test_client import PAGE_BYTES, PAGE_TOKENS, refused

TOKENS = pack(range(2 * PAGE_TOKENS))


def sizes(number: int, path: str = "auto", page_bytes: int = PAGE_BYTES) -> ShardSettings:
    """A small shard whose pages have two layers."""
    return ShardSettings(
        capacity=Capacity(8, 4), page_tokens=PAGE_TOKENS, page_bytes=page_bytes, number=number, layers=2,
        lease_s=1.5, transfer=TransferSettings(path=path),
    )  # fmt: skip


@asynccontextmanager
async def two_shards(folder: Path, path: str = "auto", other=None):
    """Two shards, and a pool over them."""
    async with (
        open_shard("s0", folder, sizes(0, path)) as s0,
        open_shard("s1", folder, sizes(1, **{"path": path, **(other or {})})) as s1,
        open_pool("me", folder, {"s0": s0, "s1": s1}) as pool,
    ):
        yield pool, {"s0": s0, "s1": s1}


async def filled(pool, words: str, shard: str = "s0"):
    """A lease on pages that are each filled with one letter."""
    lease = await pool.alloc_mem(len(words), shard)
    for word, address in zip(words, lease.addresses, strict=True):
        pool.write(address, word.encode() * PAGE_BYTES)
    return lease


def words(pool, addresses) -> str:
    """The letters that pages are filled with."""
    found = [bytes(pool.read(one)) for one in addresses]
    assert all(page == page[:1] * PAGE_BYTES for page in found), "a page is half written"
    return "".join(page[:1].decode() for page in found)


@pytest.mark.parametrize("path", ["mapped", "tcp"])
async def test_pages_go_to_another_shard(folder, path) -> None:
    """Pages are copied to another shard, into new pages or the caller's own, and nothing stays leased."""
    async with two_shards(folder, path) as (pool, _):
        mine = await filled(pool, "abc")
        there = await pool.transfer("s1", mine.addresses[1:], granularity=Granularity.BY_LAYER)
        assert words(pool, there.addresses) == "bc"
        pool.write(there.addresses[0], b"x" * PAGE_BYTES)  # a copy, and its owner's
        assert words(pool, mine.addresses) == "abc"
        into = await pool.transfer(
            "s1", mine.addresses[:2], there.addresses[::-1], granularity=Granularity.BY_REQUEST
        )
        assert (into.id, words(pool, there.addresses)) == (there.id, "ba")
        assert await pool.free_mem(there) == 2
        assert len((await pool.alloc_mem(8, "s1")).addresses) == 8


async def test_what_is_inserted_there_can_be_matched(folder) -> None:
    """Pages sent with their tokens can be matched at the other shard and are read-only from then on."""
    async with two_shards(folder) as (pool, _):
        mine = await filled(pool, "ab")
        sent = await pool.transfer_with_insert("s1", TOKENS, mine.addresses)
        assert sent.cached_tokens == 2 * PAGE_TOKENS
        await refused(PoolError.RETIRED, pool.write, sent.addresses[0], b"x")
        await pool.free_mem(sent)
        found = await pool.match(TOKENS, "s1")
        assert words(pool, found.addresses) == "ab"
        assert (await pool.match(TOKENS, "s0")).cached_tokens == 0
        await pool.free_mem(mine)
        place = await pool.alloc_mem(3, "s0")
        back = await pool.transfer_with_insert("s0", TOKENS, found.addresses, place.addresses[1:])
        assert (back.id, words(pool, back.addresses[:2])) == (place.id, "ab")
        assert (await pool.match(TOKENS, "s0")).addresses == place.addresses[1:]
        await refused(PoolError.RETIRED, pool.transfer, "s0", found.addresses, place.addresses[1:])


async def test_pages_go_to_another_program(folder) -> None:
    """Pages can be sent to another program together with private data, as in the paper's handoff."""
    async with two_shards(folder) as (pool, shards), open_pool("d", folder, shards) as other:
        mine = await filled(pool, "ab")
        async with trio.open_nursery() as nursery:

            async def decode() -> None:
                got = await other.receive("s1")
                assert (got.sender, got.private) == (pool.me, b"request 7")
                assert (got.lease.cached_tokens, words(other, got.lease.addresses)) == (2 * PAGE_TOKENS, "ab")

            nursery.start_soon(decode)
            moved = await pool.send("s1", mine.addresses, other.me, b"request 7", TOKENS)
            assert moved == 2 * PAGE_BYTES
        await pool.send("s1", mine.addresses, other.me, b"request 8")  # before it is asked for
        assert (await other.receive("s1")).private == b"request 8"


async def test_what_nobody_claims_comes_free(folder) -> None:
    """Pages that were sent and never claimed become free after a while."""
    async with two_shards(folder) as (pool, shards), open_pool("d", folder, shards) as other:
        mine = await filled(pool, "abcd")
        await pool.send("s1", mine.addresses, other.me)
        await refused(PoolError.NO_PAGES, pool.alloc_mem, 8, "s1")
        with trio.fail_after(10):
            assert len((await pool.acquire(pack(range(8 * PAGE_TOKENS)), 0, "s1")).addresses) == 8


async def test_a_cancelled_transfer_leaves_nothing(folder) -> None:
    """A transfer that is cancelled at any moment leaves no page leased on either side."""
    async with two_shards(folder, "tcp") as (pool, _):
        for after in [0.0, 0.0005, 0.001, 0.002, 0.004]:
            mine = await filled(pool, "abcd")
            with trio.move_on_after(after):
                await pool.free_mem(await pool.transfer_with_insert("s1", pack(range(16)), mine.addresses))
            pool.write(mine.addresses[0], b"x")
            await pool.free_mem(mine)
            for shard in ("s0", "s1"):
                with trio.fail_after(10):  # the shards hear of it some time after
                    everything = await pool.acquire(pack(range(50, 82)), 0, shard)
                assert len(everything.addresses) == 8
                await pool.free_mem(everything)


@pytest.fixture
def held_up(monkeypatch):
    """Has a pool send the messages that ``which`` picks only after 50 ms."""

    def hold_up(pool, nursery, which) -> None:
        send = pool._link.send

        async def later(*told) -> None:
            await trio.sleep(0.05)
            send(*told)

        def sort(to, message) -> None:
            nursery.start_soon(later, to, message) if which(message) else send(to, message)

        monkeypatch.setattr(pool._link, "send", sort)

    return hold_up


async def test_a_cancelled_transfer_is_over_before_its_pages_can_be_written(folder, held_up) -> None:
    """If it was not, what is written next could arrive under the tokens of what was there."""
    async with two_shards(folder) as (pool, _), trio.open_nursery() as nursery:
        mine = await filled(pool, "ab")
        held_up(pool, nursery, lambda message: isinstance(message, FreeMem) and not message.lease)
        with trio.move_on_after(0):
            await pool.transfer_with_insert("s1", TOKENS, mine.addresses)
        pool.write(mine.addresses[0], b"x" * PAGE_BYTES)
        await trio.sleep(0.1)
        found = await pool.match(TOKENS, "s1")
        assert words(pool, found.addresses) in ("", "ab")


async def test_pages_stay_as_they_are_until_their_last_transfer_has_ended(folder, held_up) -> None:
    """If the end of the first set them free, the second would carry what is written meanwhile."""
    async with two_shards(folder) as (pool, _), trio.open_nursery() as nursery:
        mine = await filled(pool, "ab")
        held_up(pool, nursery, lambda message: isinstance(message, Transfer) and message.tokens)
        nursery.start_soon(pool.transfer_with_insert, "s1", TOKENS, mine.addresses)
        await pool.transfer("s1", mine.addresses)
        await refused(PoolError.MOVING, pool.write, mine.addresses[0], b"x")
    assert not nursery.child_tasks


async def test_every_misuse_has_its_code_and_changes_nothing(folder) -> None:
    """Each misuse of a transfer is refused with its own code and changes nothing."""
    async with two_shards(folder) as (pool, shards):
        mine = await filled(pool, "ab")
        a, b = mine.addresses
        at = unpack(a)
        theirs = await filled(pool, "yz", "s1")
        y, z = theirs.addresses
        low = await pool.alloc_mem(1, "s0", Tier.HOST)
        deep = await pool.alloc_mem(1, "s1", Tier.HOST)
        second = await pool.alloc_mem(1, "s1")
        stale = pack_address(Parts(0, at.incarnation ^ 1, Tier.DEVICE, at.page))
        beyond = pack_address(Parts(0, at.incarnation, Tier.DEVICE, 1000))
        foreign = pack_address(Parts(5, at.incarnation, Tier.DEVICE, 0))
        for code, *call in [
            (PoolError.NOT_HELD, "s1", ()),
            (PoolError.NOT_HELD, "s1", (a, a)),
            (PoolError.NOT_HELD, "s1", (a, beyond)),
            (PoolError.FOREIGN_ADDRESS, "s1", (foreign,)),
            (PoolError.FOREIGN_ADDRESS, "s1", (a, y)),
            (PoolError.STALE_ADDRESS, "s1", (a, stale)),
            (PoolError.BAD_TIER, "s1", low.addresses),
            (PoolError.BAD_TIER, "s1", (a,), deep.addresses),
            (PoolError.DOES_NOT_FIT, "s1", (a, b), (y,)),
            (PoolError.NOT_HELD, "s1", (a, b), (y, y)),
            (PoolError.NOT_HELD, "s1", (a, b), (y, *second.addresses)),
            (PoolError.FOREIGN_ADDRESS, "s1", (a,), (b,)),
            (PoolError.NO_PATH, "s0", (a, b)),
            (PoolError.NO_PATH, "s0", (a,), (b,)),
        ]:
            await refused(code, pool.transfer, *call)
        for code, tokens, src in [
            (PoolError.NOT_WHOLE_PAGES, TOKENS[:8], (a,)),
            (PoolError.DOES_NOT_FIT, TOKENS, (a,)),
        ]:
            await refused(code, pool.transfer_with_insert, "s1", tokens, src)
        large = bytes(PRIVATE_BYTES_MAX + 1)
        with trio.fail_after(5):
            await refused(PoolError.DOES_NOT_FIT, pool.send, "s1", (a,), pool.me, large)
            await refused(PoolError.DOES_NOT_FIT, pool.send, "s1", (a,), pool.me, bytes(FRAME_BYTES_MAX))
        for wrong in (-1.0, 0.0, float("inf"), float("nan")):
            with pytest.raises(PoolError, match="bad_count"):
                await pool.transfer("s1", (a,), deadline_s=wrong)
        await pool.alloc_mem(5, "s1")
        await refused(PoolError.NO_PAGES, pool.transfer, "s1", (a,))
        async with open_pool("other", folder, shards) as other:
            await refused(PoolError.NOT_HELD, other.transfer, "s1", (a,))
            their = await filled(other, "q")
            await refused(PoolError.NOT_HELD, other.transfer, "s1", their.addresses, (y,))
        assert await pool.insert(TOKENS[:16], (y,)) == 0
        await refused(PoolError.RETIRED, pool.transfer, "s1", (a,), (y,))
        await refused(PoolError.RETIRED, pool.transfer_with_insert, "s1", TOKENS[:16], (a,), (z,))
        assert (words(pool, (a, b)), words(pool, (y, z))) == ("ab", "yz")
        pool.write(a, b"x")
        pool.write(z, b"x")
        assert (await pool.match(TOKENS, "s1")).cached_tokens == PAGE_TOKENS


@pytest.mark.parametrize("other", [{"path": "tcp"}, {"page_bytes": 2 * PAGE_BYTES}])
async def test_shards_without_a_way_to_each_other_say_so(folder, other) -> None:
    """A transfer between shards without a common path is refused at once."""
    async with two_shards(folder, "mapped", other) as (pool, _):
        mine = await filled(pool, "a")
        await refused(PoolError.NO_PATH, pool.transfer, "s1", mine.addresses)


async def test_a_dead_receiver_costs_a_deadline(folder) -> None:
    """A transfer to a dead shard ends with an error at its deadline, and the pages can be used again."""
    life = trio.CancelScope()

    async def shard(task_status) -> None:
        with life:
            async with open_shard("s1", folder, sizes(1)) as endpoint:
                task_status.started(endpoint)
                await trio.sleep_forever()

    async with trio.open_nursery() as nursery, open_shard("s0", folder, sizes(0)) as s0:
        s1 = await nursery.start(shard)
        async with open_pool("me", folder, {"s0": s0, "s1": s1}) as pool:
            mine = await filled(pool, "a")
            life.cancel()
            with trio.fail_after(5), pytest.raises(PoolError, match="deadline"):
                await pool.transfer("s1", mine.addresses, deadline_s=0.5)
            pool.write(mine.addresses[0], b"x")
