"""What a request with a deadline can expect: when its first token comes, which workers are in time, and what it waits
for."""

from __future__ import annotations

import pytest

from memserve.identity import ActorId
from memserve.scheduling.outlook import Forecast, Prospect, forecasts, prospect
from memserve.tokens import pack
from placement_world import World, busy

PROMPT = 500
ANSWER = 160.0
INF = float("inf")


def looked_at(world: World) -> list[Forecast]:
    """The forecasts of a prompt that is not cached anywhere."""
    match = world.index.match("anne", pack(range(PROMPT)), world.now)
    found = forecasts(world.fleet, match, PROMPT, ANSWER, world.now)
    return sorted(found, key=lambda one: one.worker.member.id)


def test_a_prompt_waits_for_a_row_where_the_batch_is_full() -> None:
    """On a full batch, the forecast includes the wait for a free row."""
    world = World("w0", "w1")
    world.report("w0", decode_rows=31.0, rows_max=32.0)
    world.report("w1", decode_rows=39.0, rows_max=32.0)
    free, full = looked_at(world)
    assert (free.row_s, full.row_s) == (0.0, pytest.approx(8 * ANSWER / 32 * full.worker.step_s))
    run_s = full.worker.prefill_s(PROMPT, 0, world.now)
    assert full.seconds == pytest.approx(full.row_s + run_s)
    assert prospect([free, full], INF, INF, world.now).soonest_s == free.seconds


def test_a_worker_that_reports_no_rows_is_taken_to_have_one() -> None:
    """A worker that reports no limit of rows, as one that only prefills, has no wait for a row."""
    world = World("w0")
    world.report("w0", decode_rows=500.0)
    assert looked_at(world)[0].row_s == 0.0


def test_only_workers_with_room_and_time_enough_are_timely() -> None:
    """Workers that are full, late, or held back from are not timely; when one will have room is reported."""
    world = World("w0", "w1", "w2")
    world.report("w0", decode_rows=32.0, rows_max=32.0)
    world.report("w1", **busy(1000))
    full, queued, free = found = looked_at(world)
    one, both = {"w2.1": free.seconds}, {"w1.1": queued.seconds, "w2.1": free.seconds}

    def timely(within_s: float, hold_back_s: float, now: float = world.now) -> Prospect:
        return prospect(found, within_s, hold_back_s, now)

    assert (timely(INF, INF).timely, timely(INF, INF).room_at) == (both, INF)
    assert (timely(free.seconds, INF).timely, timely(free.seconds, INF).room_at) == (one, INF)
    room_at = queued.worker.queue_until - 0.1
    assert (timely(INF, 0.1).timely, timely(INF, 0.1).room_at) == (one, room_at)
    assert timely(INF, 0.1, room_at).timely == both
    assert ActorId("w0.1") not in timely(INF, INF).timely and full.row_s > 0


def test_who_was_late_before_needs_a_margin() -> None:
    """A worker whose first tokens came late before gets a margin on its forecasts."""
    world = World("w0", "w1")
    world.report("w0", first_tokens_late_share=0.5)
    late, punctual = found = looked_at(world)
    assert late.seconds == punctual.seconds == punctual.sure_s
    assert late.sure_s == pytest.approx(late.seconds + late.margin_s)
    assert late.margin_s > 0.5 * late.seconds
    assert set(prospect(found, late.seconds, INF, world.now).timely) == {"w1.1"}
    assert prospect([late], late.seconds, INF, world.now).soonest_s == late.sure_s


def test_nobody_is_expected_of_where_nobody_is() -> None:
    """Without workers there is no forecast."""
    assert prospect([], 1.0, 1.0, 0.0) == Prospect()
    assert Prospect().soonest_s == INF and not Prospect().timely
