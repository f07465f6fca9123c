"""The same tests for all movers: what arrives, what is refused, and what happens at a deadline."""

from __future__ import annotations

import errno
import gc
import os
import threading
from pathlib import Path

import attrs
import pytest
import trio

from memserve.errors import PeerUnreachable
from memserve.kernels.arena import Arena, serve_arena
from memserve.transfer import cuda, mapped
from memserve.transfer.mapped import HostReach
from memserve.transfer.mover import PATHS as ALL_PATHS
from memserve.transfer.mover import PieceFeed, chosen_paths, host_identity
from memserve.transfer.values import Piece, TransferDone
from memserve.transfer_messages import Failure, Granularity, Way
from movers import GEOMETRY, PAGES, PATHS, pair

pytestmark = pytest.mark.parametrize("path", PATHS)

SCATTERED = ([7, 8, 9, 3, 30, 2, 39, 0], [1, 2, 3, 9, 8, 7, 0, 39])


def mappings(name):
    """How often a memfd is mapped in this process, without what earlier tests left to the garbage collector."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count(f"/memfd:{name} ")


@pytest.fixture
def place(tmp_path_factory):
    """A directory with a path short enough for sockets."""
    return tmp_path_factory.mktemp("m")


@pytest.mark.parametrize("granularity", Granularity)
async def test_pages_arrive_whole_and_nothing_else_changes(path, granularity, place):
    """Scattered pages arrive whole in their places, and nothing else is written."""
    async with pair(path, place) as both:
        transfer = both.transfer(*SCATTERED, granularity)
        result = await both.send(transfer)
        assert result == TransferDone(1, len(SCATTERED[0]) * GEOMETRY.page_bytes)
        both.assert_moved(transfer)


async def test_a_whole_arena_moves_in_one_run(path, place):
    """A transfer of the whole arena arrives."""
    async with pair(path, place) as both:
        transfer = both.transfer(range(PAGES), range(PAGES))
        assert isinstance(await both.send(transfer), TransferDone)
        both.assert_moved(transfer)


async def test_many_transfers_at_a_time(path, place):
    """Many transfers at a time arrive without mixing up their pages."""
    async with pair(path, place) as both:
        results = []

        async def one(transfer):
            results.append(await both.send(transfer))

        whole = [both.transfer([PAGES - 1 - i], [i], list(Granularity)[i % 3]) for i in range(PAGES)]
        async with trio.open_nursery() as nursery:
            for transfer in whole:
                nursery.start_soon(one, transfer)
        assert sorted(result.id for result in results) == [transfer.id for transfer in whole]
        assert all(isinstance(result, TransferDone) for result in results)
        everything = attrs.evolve(
            whole[0], source=tuple(reversed(range(PAGES))), destination=tuple(range(PAGES))
        )
        both.assert_moved(everything)


async def test_layers_leave_as_they_become_ready(path, place):
    """With by_layer, each layer is sent as soon as it is ready, also if it is announced in parts or twice."""
    async with pair(path, place) as both:
        transfer = both.transfer(*SCATTERED, Granularity.BY_LAYER)
        feed = PieceFeed(len(transfer.source), GEOMETRY.layers)
        outcome = []
        part = GEOMETRY.page_bytes // GEOMETRY.layers

        async def send():
            outcome.append(await both.send(transfer, feed))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            for layer in range(GEOMETRY.layers):
                feed.put((Piece(0, 5, layer),))
                feed.put((Piece(0, 8, layer),))  # the first five again: harmless
                for source, destination in zip(*SCATTERED, strict=True):
                    shift = layer * part
                    there = both.destination[destination * GEOMETRY.page_bytes + shift :][:part]
                    here = both.source[source * GEOMETRY.page_bytes + shift :][:part]
                    while there != here:
                        await trio.sleep(0.001)
                assert not (outcome and layer < GEOMETRY.layers - 1), outcome
        assert isinstance(outcome[0], TransferDone)
        both.assert_moved(transfer)


async def test_what_is_never_ready_ends_at_the_deadline(path, place):
    """A transfer whose layers never become ready fails at its deadline."""
    async with pair(path, place) as both:
        transfer = both.transfer(*SCATTERED, Granularity.BY_LAYER)
        feed = PieceFeed(len(transfer.source), GEOMETRY.layers)
        feed.put((Piece(0, 8, 0),))
        result = await both.send(transfer, feed, deadline_s=0.2)
        assert result.failure is Failure.DEADLINE


async def test_pages_that_are_not_ones_own_are_refused(path, place):
    """Page numbers outside the arena are refused: they would read other memory."""
    async with pair(path, place) as both:
        transfer = both.transfer([0, PAGES], [0, 1])
        result = await both.send(transfer)
        assert result.failure is Failure.REFUSED and f"page {PAGES} is not one of" in result.message
        assert not any(both.destination)


async def test_nobody_there_is_a_peer_gone(path, place):
    """A transfer to a receiver that is not there fails with PEER_GONE."""
    nowhere = {
        "mapped": Way("mapped", str(place / "gone")),
        "cuda": Way("cuda", str(place / "gone")),
        "tcp": Way("tcp", "127.0.0.1:9", bytes(32)),
        "nixl": Way("nixl", "0", b"no metadata"),
    }
    async with pair(path, place) as both:
        both.way = nowhere[path]
        result = await both.send(both.transfer([0], [0]))
        assert result.failure is Failure.PEER_GONE


async def test_a_cancelled_send_leaves_nothing_running(path, place):
    """After a send was cancelled no more bytes are written."""
    async with pair(path, place) as both:
        transfer = both.transfer(range(PAGES), range(PAGES), Granularity.BY_LAYER)
        feed = PieceFeed(PAGES, GEOMETRY.layers)
        feed.put((Piece(0, PAGES, 0),))
        with trio.move_on_after(0.05):
            await both.send(transfer, feed)
        both.destination[:] = bytes(len(both.destination))
        feed.put((Piece(0, PAGES, 1),))
        await trio.sleep(0.05)
        assert not any(both.destination)


async def test_what_is_known_of_a_receiver_can_be_forgotten(path, place):
    """Forgetting a receiver unmaps its arena; a later send maps it again."""
    async with pair(path, place) as both:
        before = mappings("memserve-b.1")
        assert isinstance(await both.send(both.transfer([1], [2])), TransferDone)
        assert mappings("memserve-b.1") == before + (path == "mapped")
        both.mover.forget(both.way)
        both.mover.forget(both.way)
        assert mappings("memserve-b.1") == before
        both.destination[:] = bytes(len(both.destination))
        again = both.transfer([3], [4])
        assert isinstance(await both.send(again), TransferDone)
        both.assert_moved(again)


async def test_a_receiver_that_dies_while_its_arena_is_mapped_does_not_stay_mapped(path, place, monkeypatch):
    """If it did, a dead shard's memory would stay taken, and its successor might not find enough to start."""
    if path != "mapped":
        return
    async with pair(path, place) as both:
        attach, mapped, go_on = HostReach.attach, threading.Event(), threading.Event()

        def slowly(*told):
            arena = attach(*told)
            mapped.set()
            assert go_on.wait(5)
            return arena

        before = mappings("memserve-b.1")
        monkeypatch.setattr(HostReach, "attach", slowly)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(both.send, both.transfer([1], [2]))
            assert await trio.to_thread.run_sync(mapped.wait, 5)
            nursery.cancel_scope.cancel()
            both.mover.forget(both.way)
            go_on.set()
        assert mappings("memserve-b.1") == before


async def test_a_shard_that_has_ended_does_not_stay_mapped(path, place):
    """Where nobody announces its end, as for a program's own shard, each would leave its memory behind."""
    if path != "mapped":
        return
    async with pair(path, place) as both:
        other = Arena.create("c.1", PAGES, GEOMETRY.page_bytes)
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_arena, other, place / "c")
            transfer, way = both.transfer([1], [2]), Way("mapped", str(place / "c"))
            sent = await both.mover.send(transfer, way, PieceFeed.whole(transfer, GEOMETRY), 9.0)
            assert isinstance(sent, TransferDone)
            nursery.cancel_scope.cancel()
        other.close()
        assert mappings("memserve-c.1") == 1
        assert isinstance(await both.send(both.transfer([1], [2])), TransferDone)
        assert mappings("memserve-c.1") == 0


async def test_a_receiver_that_does_not_hand_out_its_arena_holds_up_nobody_else(path, place, monkeypatch):
    """If it did, one paused shard would stop all transfers of its host, for seconds at a time."""
    if path != "mapped":
        return
    async with pair(path, place) as both:
        assert isinstance(await both.send(both.transfer([1], [2])), TransferDone)
        waits, go_on = threading.Event(), threading.Event()

        def paused(*_):
            waits.set()
            assert go_on.wait(5)
            raise PeerUnreachable("no answer")

        monkeypatch.setattr(HostReach, "attach", paused)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                both.mover.send, both.transfer([1], [2]), Way("mapped", "c"), PieceFeed(1, 1), 9.0
            )
            assert await trio.to_thread.run_sync(waits.wait, 5)
            done = await both.send(both.transfer([3], [4]), deadline_s=1.0)
            go_on.set()
        assert isinstance(done, TransferDone)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM])
async def test_what_cannot_be_mapped_costs_its_transfer_and_nothing_else(path, error, place, monkeypatch):
    """If the error came out of the mover, the shard would end, and take every page with it."""
    if path not in ("mapped", "cuda"):
        return
    async with pair(path, place) as both:

        def failing(*_, **__):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(mapped, "attach_arena", failing)
        monkeypatch.setattr(cuda, "open_peer_pages", failing)
        result = await both.send(both.transfer([0], [0]))
        assert result.failure is Failure.REFUSED and os.strerror(error) in result.message


async def test_pages_go_from_gpu_to_gpu_without_the_host_where_they_see_each_other(path, place):
    """Between GPUs with peer access, runs of pages are copied directly and without host memory."""
    if path != "cuda":
        return
    async with pair(path, place) as both:
        assert isinstance(await both.send(both.transfer(*SCATTERED)), TransferDone)
        assert both.runtime.peers == {(0, 1)}
        assert {(of, to) for of, to, _ in both.runtime.peer_copies} == {(0, 1)}
        assert len(both.runtime.peer_copies) == 6  # a run of neighbours is one copy


async def test_a_gpu_that_fails_fails_its_transfer_and_nothing_else(path, place, monkeypatch):
    """An error of CUDA fails its transfer, and later ones work."""
    if path != "cuda":
        return
    async with pair(path, place) as both:

        def failing(*_):
            raise both.runtime.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")

        for call in ("memcpyPeerAsync", "streamCreateWithFlags"):
            with monkeypatch.context() as patch:
                patch.setattr(both.runtime, call, failing)
                result = await both.send(both.transfer([0], [0]))
                assert result.failure is Failure.CUT and "out of memory" in result.message
        assert isinstance(await both.send(both.transfer([0], [0])), TransferDone)


def test_a_path_is_chosen_by_the_setting(path):
    """The setting decides which path is used."""
    assert chosen_paths(path, ALL_PATHS) == (path,)
    assert path in chosen_paths("auto", ALL_PATHS)
    assert chosen_paths(path, ()) == ()
    assert host_identity() == host_identity()
