"""The shell that carries out the actions of transfer cores: it answers every action once, from a task of its own."""

from __future__ import annotations

import subprocess
import sys
from contextlib import asynccontextmanager

import attrs
import pytest
import trio

from memserve.errors import UserError
from memserve.kernels.arena import Arena, serve_arena
from memserve.messages import Gone
from memserve.settings.rules import RuleError
from memserve.transfer import nixl
from memserve.transfer.actions import (
    Expect,
    Feed,
    Probe,
    Received,
    ReceiveFailed,
    StopReceiving,
    StopWriting,
    Write,
    WriteFailed,
    Wrote,
)
from memserve.transfer.settings import TransferSettings
from memserve.transfer.shell import open_transfers
from memserve.transfer.values import PageTransfer, Piece
from memserve.transfer_messages import Failure, Granularity, Way
from movers import GEOMETRY, PAGES

LATE = float("inf")


@pytest.fixture
def place(tmp_path_factory):
    """The socket at which the arena is served."""
    return tmp_path_factory.mktemp("s") / "arena"


@asynccontextmanager
async def shell(place, **settings):
    """A shell that sends to itself, its arena, and the answers that it gives."""
    arena = Arena.create("a.1", PAGES, GEOMETRY.page_bytes)
    answers = []
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_arena, arena, place)
        async with open_transfers(
            TransferSettings(**settings), arena, GEOMETRY, place, answers.append
        ) as one:
            yield one, arena.memory, answers
        nursery.cancel_scope.cancel()
    arena.close()


async def until(answers, count):
    """Wait until there are so many answers."""
    while len(answers) < count:
        await trio.sleep(0.001)


def leaf(error):
    """The one exception in nested groups."""
    return leaf(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def write(way, number=1, granularity=Granularity.AGGREGATED, fed=False):
    """A write of page 0 to page 5."""
    return Write(PageTransfer("a.1", number, (0,), (5,), granularity), way, LATE, fed)


@pytest.mark.parametrize("path", ["mapped", "tcp"])
async def test_pages_go_the_way_that_the_setting_names(path, place):
    """Pages take the path that the setting names, and the answer comes from another task."""
    async with shell(place, path=path) as (one, memory, answers):
        assert one.paths == (path,) and [way.path for way in one.ways] == [path]
        memory[: GEOMETRY.page_bytes] = b"k" * GEOMETRY.page_bytes
        if path == "tcp":
            one.perform[Expect](Expect("a.1", 1, (5,), Granularity.AGGREGATED, LATE))
        one.perform[Write](write(one.ways[0]))
        assert answers == [], "an answer from within perform would enter a core's turn twice"
        await until(answers, 1 + (path == "tcp"))
        assert Wrote(1, GEOMETRY.page_bytes) in answers
        assert (Received("a.1", 1) in answers) == (path == "tcp")
        assert memory[5 * GEOMETRY.page_bytes :][: GEOMETRY.page_bytes] == b"k" * GEOMETRY.page_bytes


async def test_auto_prefers_the_mapped_path(place):
    """With ``auto`` the mapped path comes first and TCP last."""
    async with shell(place) as (one, _, _):
        assert one.paths[0] == "mapped" and one.paths[-1] == "tcp"
        assert [way.path for way in one.ways] == list(one.paths)


async def test_a_fed_transfer_is_stopped_on_request(place):
    """A transfer that waits for layers stops on request and reports it once."""
    async with shell(place, path="mapped") as (one, memory, answers):
        memory[: GEOMETRY.page_bytes] = b"k" * GEOMETRY.page_bytes
        one.perform[Write](write(one.ways[0], granularity=Granularity.BY_LAYER, fed=True))
        one.perform[Feed](Feed(1, (Piece(0, 1, 0),)))
        while not memory[5 * GEOMETRY.page_bytes]:
            await trio.sleep(0.001)
        one.perform[StopWriting](StopWriting(1))
        await until(answers, 1)
        assert answers == [WriteFailed(1, Failure.WITHDRAWN, "stopped")]
        one.perform[Feed](Feed(1, (Piece(0, 1, 1),)))
        one.perform[StopWriting](StopWriting(1))


async def test_a_write_whose_time_is_up_is_answered(place):
    """A write whose deadline has passed is answered with DEADLINE."""
    async with shell(place, path="mapped") as (one, _, answers):
        one.perform[Write](attrs.evolve(write(one.ways[0]), deadline=0.0))
        await until(answers, 1)
        assert answers[0].failure is Failure.DEADLINE


async def test_a_way_that_this_process_does_not_have_is_refused(place):
    """A write on a path that this process does not use is refused."""
    async with shell(place, path="tcp") as (one, _, answers):
        one.perform[Write](write(Way("mapped", str(place))))
        await until(answers, 1)
        assert answers[0].failure is Failure.REFUSED and "TransferSettings" in answers[0].message


async def test_what_is_expected_and_stopped_is_answered_once(place):
    """A stopped receive is answered once, also if its sender never came."""
    async with shell(place, path="tcp") as (one, _, answers):
        one.perform[Expect](Expect("a.2", 1, (5,), Granularity.AGGREGATED, LATE))
        one.perform[StopReceiving](StopReceiving("a.2", 1))
        one.perform[StopReceiving](StopReceiving("a.2", 1))
        assert answers == []
        await until(answers, 1)
        assert answers == [ReceiveFailed("a.2", 1, Failure.WITHDRAWN, "nothing had come in")]


async def test_settings_that_this_machine_cannot_keep_are_the_users_error(place, monkeypatch):
    """Settings that this machine cannot fulfil are user errors."""
    monkeypatch.setattr(nixl, "available", lambda: False)
    with pytest.RaisesGroup(UserError, flatten_subgroups=True) as caught:
        async with shell(place, path="nixl"):
            pass
    assert "memserve[multihost]" in str(leaf(caught.value))
    with pytest.RaisesGroup(UserError, flatten_subgroups=True) as caught:
        async with shell(place, path="tcp", host="192.0.2.1"):
            pass
    assert "transfer host '192.0.2.1'" in str(leaf(caught.value))


@pytest.mark.parametrize("wrong", [{"path": "pigeon"}, {"host": "0.0.0.0"}, {"host": "10.0.0.1:99"}])
def test_settings_that_cannot_work_are_refused_at_once(wrong):
    """Unknown paths and unusable addresses are refused."""
    with pytest.raises(RuleError, match="must be"):
        TransferSettings(**wrong)


async def test_a_sender_that_has_ended_is_found_out(place):
    """Where nobody announces its death, the pages that it was to fill would stay taken for good."""
    async with shell(place, path="mapped") as (one, _, told):
        process = await trio.lowlevel.open_process([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        one.perform[Probe](Probe("a.1", process.pid))
        await trio.sleep(0.05)
        assert told == []
        process.kill()
        await trio.sleep(0.2)
        one.perform[Probe](Probe("a.1", process.pid))  # it is not waited for yet
        await until(told, 1)
        await process.wait()
        one.perform[Probe](Probe("a.2", process.pid))
        await until(told, 2)
        assert told == [Gone(("a.1",)), Gone(("a.2",))]
