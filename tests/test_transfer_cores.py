"""The two cores of a transfer under loss, repetition, delay, cuts, pauses and deaths, in virtual time."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.transfer.incoming import ReceiveRefused
from memserve.transfer.values import TransferDone
from memserve.transfer_messages import Failure, Granularity, TransferOffer
from transfer_world import GEOMETRY, Faults, Pool, World

OFFER = TransferOffer(
    1,
    2,
    GEOMETRY.page_bytes,
    GEOMETRY.layers,
    Granularity.AGGREGATED,
    "host",
    7,
    ("mapped", "tcp", "nixl"),
    5.0,
)


HOSTILE = st.builds(
    Faults,
    lose=st.sampled_from([0.0, 0.1, 0.5]),
    repeat=st.sampled_from([0.0, 0.2]),
    cut=st.sampled_from([0.0, 0.1]),
    delay_s=st.sampled_from([0.001, 0.05, 0.5]),
    refuse_commit=st.sampled_from([0.0, 0.2]),
)
EVENT = st.tuples(
    st.sampled_from(["send", "send", "send", "feed", "kill", "pause", "libel", "wait", "evict"]),
    st.integers(0, 2),
    st.integers(0, 2),
    st.integers(1, 6),
)


@settings(max_examples=500, deadline=None)
@given(
    HOSTILE,
    st.lists(EVENT, max_size=25),
    st.sampled_from([("mapped",), ("tcp",), ("mapped", "tcp")]),
    st.integers(0, 1 << 32),
)
def test_nothing_leaks_and_no_half_written_page_is_ever_acknowledged(faults, events, paths, seed):
    """In any order of losses, pauses and deaths no page leaks, and only whole pages are acknowledged.

    The world asserts at every write that the page still belongs to the transfer, and at every commit that it is whole.
    """
    world = World(faults, seed)
    names = ["a", "b", "c"]
    running = [world.shard(name, paths=paths) for name in names]
    for what, i, j, amount in events:
        sender, receiver = running[i], running[j]
        if what in ("send", "feed") and i != j:
            world.send(sender, receiver, amount, seconds=amount / 2, fed=what == "feed")
        elif what == "kill":
            world.kill(sender.id)
            running[i] = world.shard(names[i], paths=paths)
        elif what == "pause":
            world.pause(sender.id, amount)
        elif what == "libel":  # declared dead, but it lives
            world.announce(sender.id)
        elif what == "evict":
            sender.pool.forget()
        world.run(world.now + amount * faults.delay_s)

    world.faults = attrs.evolve(faults, lose=0.0)  # the network heals: within its lifetime all must end
    world.run(world.now + 300.0)
    world.settled()


@pytest.mark.parametrize("path", ["mapped", "tcp"])
def test_in_a_good_world_everything_arrives(path):
    """Without faults every transfer arrives."""
    world = World(Faults(), 1)
    sender, receiver = world.shard("a", paths=(path,)), world.shard("b", paths=(path,))
    numbers = [world.send(sender, receiver, 3, 5.0, fed=bool(i % 2)) for i in range(4)]
    world.run(5.0)

    assert [type(sender.reports[number]) for number in numbers] == [TransferDone] * 4
    assert sorted(receiver.pool.committed) == [(sender.id, number) for number in numbers]
    world.settled()


def test_a_full_receiver_says_so_at_once():
    """A full receiver refuses at once instead of letting the sender wait for its deadline."""
    world = World(Faults(), 1)
    sender, receiver = world.shard("a"), world.shard("b", pages=4)
    number = world.send(sender, receiver, 5, seconds=60.0)
    world.run(0.1)

    assert sender.reports[number].failure is Failure.RECEIVER_FULL
    world.settled()


def test_the_model_pool_is_one():
    """The model's pool notices incomplete pages and a lack of pages."""
    world = World(Faults(), 1)
    shard = world.shard("a", pages=2)
    pool = Pool(shard, [0, 1])
    pages = pool.grant(("a.1", 1), OFFER)
    with pytest.raises(AssertionError, match="not complete"):
        pool.commit(("a.1", 1), OFFER, pages)
    with pytest.raises(ReceiveRefused):
        pool.grant(("a.1", 2), OFFER)
