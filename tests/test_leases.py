"""Who holds what until when."""

import math

import pytest

from memserve.errors import PoolError
from memserve.mempool.leases import Leases
from memserve.mempool.prompt_tree import PromptTree

TREE = PromptTree(4)


def opened(leases, owner, pages, now=0.0):
    return leases.open(owner, "anne", pages, TREE.pin("anne", b""), now)


def test_an_owner_that_is_heard_keeps_all_its_leases():
    """One heartbeat renews all leases of an owner."""
    leases = Leases(5.0, 1)
    opened(leases, "p.1", [0], now=0.0)
    opened(leases, "p.1", [1], now=1.0)
    leases.renew("p.1", 4.0)

    assert leases.deadline == 9.0
    assert leases.silent(8.9) == []
    assert leases.silent(9.0) == ["p.1"]
    assert [lease.pages for lease in leases.drop("p.1")] == [[0], [1]]
    assert leases.deadline == math.inf
    leases.check()


def test_a_late_heartbeat_does_not_shorten_a_lease():
    """A heartbeat that arrives late does not shorten a lease."""
    leases = Leases(5.0, 1)
    opened(leases, "p.1", [0], now=10.0)
    leases.renew("p.1", 2.0)

    assert leases.deadline == 15.0


def test_only_the_owner_gets_at_a_lease():
    """Only its owner can use a lease."""
    leases = Leases(5.0, 7)
    lease = opened(leases, "p.1", [0])

    with pytest.raises(PoolError, match="not_owner"):
        leases.get("d.1", lease.id)
    with pytest.raises(PoolError, match="unknown_lease"):
        leases.get("p.1", lease.id + 1)
    assert lease.id == 7


def test_a_moved_lease_outlives_its_former_owner():
    """A lease that was handed over does not end with its former owner."""
    leases = Leases(5.0, 1)
    lease = opened(leases, "p.1", [0, 1])
    leases.move(lease, "d.1", 1.0)

    assert leases.drop("p.1") == []
    assert leases.get("d.1", lease.id) is lease
    leases.check()
    leases.close(lease)
    assert len(leases) == 0
    leases.check()


def test_private_pages_are_the_unretired_and_the_kept():
    """A lease's private pages are those that are not in the index, and the duplicates that it kept."""
    leases = Leases(5.0, 1)
    lease = opened(leases, "p.1", [10, 11, 12, 13])
    lease.retired_tokens, lease.kept = 8, [11]

    assert lease.private(4) == [11, 12, 13]
