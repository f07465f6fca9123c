"""Roles that follow the load: what the scheduler decides, that it pays, and that it is no worse than all roles at once."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memserve.actions import Log
from memserve.costs import Site, StepCosts
from memserve.identity import ActorId, actor_name
from memserve.messages import Change, Member
from memserve.scheduling.changes import HAND, SCHEDULER, changed
from memserve.scheduling.fleet import Fleet
from memserve.scheduling.membership import pairs
from memserve.scheduling.roles import CALM_S, EMPTY_SIDE_S, TICK_S, Prices, Roles
from memserve.sim.layout import fixed
from memserve.sim.report import Report
from memserve.sim.run import Run, simulate
from memserve.sim.workloads import generated

COSTS = StepCosts(((1.0, 0.01), (1000.0, 1.0)), row_s=1e-3, chunk_tokens=256)
SHARD = Member(ActorId("s0.1"), "MemPoolShard", "", 1, "ready")


@attrs.define
class Office:
    """A scheduler's roles and its fleet, with workers that change their role when asked."""

    roles: Roles = attrs.field(factory=lambda: Roles(True, Prices(3.0)))
    fleet: Fleet = attrs.field(factory=Fleet)
    members: dict[str, Member] = attrs.field(factory=dict)
    now: float = 0.0
    said: list[dict] = attrs.field(factory=list)
    served: bool = False
    """Whether a request could be placed."""

    @classmethod
    def of(cls, *workers: tuple[str, str]) -> Office:
        """An office with workers of these names and roles, which have nothing to do."""
        office = cls()
        office.fleet.heard(SHARD, 0.0)
        for name, role in workers:
            office.members[name] = Member(
                ActorId(f"{name}.1"), "DecodeWorker", "", 1, "ready", role, SHARD.id, {}, COSTS,
                role_configured=role,
            )  # fmt: skip
        return office

    def load(self, name: str, waiting: float = 0.0, rows: float = 0.0) -> None:
        """Give a worker prompt tokens that wait, and streams."""
        load = {"waiting_tokens": waiting, "decode_rows": rows, "context_tokens": rows * 100}
        self.members[name] = attrs.evolve(self.members[name], load=load)

    def by_hand(self, name: str, role: str) -> None:
        """An operator sets the role."""
        self.members[name] = changed(self.members[name], Change(role))

    def lose(self, name: str) -> None:
        """The worker dies and does not come back."""
        self.fleet.forget(self.members.pop(name).id)

    def run(self, seconds: float) -> dict[str, str]:
        """Let time pass, with a heartbeat every TICK_S; returns the roles afterwards."""
        end = self.now + seconds
        while self.now < end:
            self.now += TICK_S
            for member in list(self.members.values()):
                self.fleet.heard(member, self.now)
                self._obey(self.roles.heard(member, self.now))
            self._obey(self.roles.advance(self.fleet, self.now))
            self.served = bool(pairs([SHARD, *self.members.values()]))
        return {name: one.role for name, one in self.members.items()}

    def _obey(self, actions) -> None:
        for action in actions:
            if isinstance(action, Log):
                self.said.append(action.data)
            else:
                name = actor_name(action.to)
                self.members[name] = changed(self.members[name], action.message)

    def settle(self, site: Site, *names: str) -> None:
        """Put workers on the cores of one site."""
        for name in names:
            self.members[name] = attrs.evolve(self.members[name], site=site)


def pd(prefills: int, decodes: int) -> Office:
    """An office with so many prefill and decode workers."""
    return Office.of(
        *((f"p{i}", "prefill") for i in range(prefills)), *((f"d{i}", "decode") for i in range(decodes))
    )


def test_where_prompts_wait_a_decode_worker_helps():
    """While prompts wait, the idle decode worker also prefills, and a second later another one."""
    office = pd(1, 3)
    office.load("p0", waiting=4000.0)
    office.load("d0", rows=5.0)
    office.load("d2", rows=5.0)
    assert office.run(1.0) == {"p0": "prefill", "d0": "decode", "d1": "both", "d2": "decode"}, "the idle one"
    (why,) = office.said
    assert (why["worker"], why["role"], why["reason"]) == ("d1.1", "both", "prompts are waiting")
    assert why["prefill_price_ms"] > 250
    assert office.members["d1"].role_by == SCHEDULER
    office.load("d1", waiting=4000.0)
    assert office.run(1.0)["d1"] == "both"
    assert len(office.said) == 2, "and another one a second later, while they wait"


def test_where_streams_are_crowded_a_prefill_worker_helps():
    """While streams are crowded, an idle prefill worker also decodes."""
    office = pd(3, 1)
    office.load("d0", rows=60.0)
    office.load("p0", waiting=10.0)
    roles = office.run(2.0)
    assert (roles["d0"], roles["p0"]) == ("decode", "prefill")
    assert "both" in (roles["p1"], roles["p2"])
    assert {one["reason"] for one in office.said} == {"streams are crowded"}


def test_one_burst_is_no_mix_of_load():
    """A short burst changes no role."""
    office = pd(2, 2)
    office.run(1.0)
    for name in ("p0", "p1"):
        office.load(name, waiting=300.0)
    office.run(TICK_S)
    for name in ("p0", "p1"):
        office.load(name)
    assert set(office.run(5.0).values()) == {"prefill", "decode"}


def test_where_both_sides_are_dear_nobody_helps_the_other():
    """While both prefill and decode workers are busy, no role changes."""
    office = pd(2, 2)
    for name in office.members:
        office.load(name, waiting=300.0 if name[0] == "p" else 0.0, rows=5.0 if name[0] == "d" else 0.0)
    office.run(10.0)
    assert office.said == []


HOST = Site("host", cores=2, threads=2)


def test_who_would_help_on_the_same_cores_takes_nothing_off():
    """An idle worker on the cores of the busy one does not help: it would slow it down as much."""
    separate, together = pd(1, 1), pd(1, 1)
    together.settle(HOST, "p0", "d0")
    for office in (separate, together):
        office.load("p0", waiting=600.0)
    assert (separate.run(1.0)["d0"], together.run(1.0)["d0"]) == ("both", "decode")
    together.load("d0", rows=5.0)
    assert together.run(2.0)["d0"] == "both", "it is busy already, and slows the queue down whatever it does"


def test_streams_that_neighbours_crowd_are_helped_by_another_host():
    """Streams that neighbours slow down count as crowded, and a worker on another host helps."""
    crowded = pd(2, 1)
    crowded.settle(HOST, "p0", "d0")
    crowded.load("p0", waiting=30.0)
    crowded.load("d0", rows=1.0)
    crowded.load("p1", waiting=40.0)
    crowded.roles.prices.answer = 100.0
    roles = crowded.run(1.0)
    assert (roles["p0"], roles["p1"]) == ("prefill", "both"), "not the one that would share their cores"
    assert {one["reason"] for one in crowded.said} == {"streams are crowded"}
    alone = pd(2, 1)
    alone.load("d0", rows=1.0)
    alone.roles.prices.answer = 100.0
    assert set(alone.run(2.0).values()) == {"prefill", "decode"}


def test_when_all_of_a_side_help_the_other_side_does_too():
    """When all decode workers also prefill, the prefill workers also decode."""
    office = pd(2, 2)
    for name in ("p0", "p1"):
        office.load(name, waiting=4000.0)
    assert set(office.run(5.0).values()) == {"both"}
    assert [one["reason"] for one in office.said] == ["prompts are waiting"] * 2 + [
        "all decode workers also prefill"
    ] * 2


@pytest.mark.parametrize(("gone", "left"), [("p0", "d0"), ("d0", "p0")])
def test_when_the_last_of_a_side_dies_another_one_takes_over(gone, left):
    """When the last worker of a role has been gone for EMPTY_SIDE_S, another takes its role over."""
    office = Office.of(("p0", "prefill"), ("d0", "decode"))
    office.run(1.0)
    office.lose(gone)
    assert office.run(EMPTY_SIDE_S - TICK_S)[left] != "both", "it may only be slower to report"
    assert office.run(2 * TICK_S)[left] == "both"


def test_at_the_start_workers_may_come_one_after_another():
    """Workers that report one after another at the start change no roles."""
    office = Office.of(("d0", "decode"))
    assert office.run(EMPTY_SIDE_S - TICK_S) == {"d0": "decode"}
    office.members |= Office.of(("p0", "prefill")).members
    assert office.run(10.0) == {"d0": "decode", "p0": "prefill"}
    assert office.said == []


def test_what_an_operator_chose_stays_through_a_restart_under_load():
    """A role set by an operator is kept when the worker restarts under load."""
    office = pd(1, 1)
    office.by_hand("d0", "decode")
    office.run(1.0)
    office.load("p0", waiting=9000.0)
    before = office.members["d0"]
    office.members["d0"] = attrs.evolve(before, id=ActorId("d0.2"), role_by="", state="starting")
    office.run(10.0)
    office.members["d0"] = attrs.evolve(office.members["d0"], state="ready")
    assert office.run(10.0)["d0"] == "decode"
    assert office.members["d0"].role_by == HAND


def test_what_an_operator_chose_stays():
    """A role set by an operator is kept until the operator gives it back with ``auto``."""
    office = pd(1, 2)
    office.by_hand("d0", "decode")
    office.load("p0", waiting=9000.0)
    assert office.run(20.0) == {"p0": "prefill", "d0": "decode", "d1": "both"}
    office.by_hand("d1", "decode")
    assert office.run(20.0)["d1"] == "decode"
    office.members["d0"] = changed(office.members["d0"], Change("auto"))
    assert office.run(5.0)["d0"] == "both", "given back, it is the scheduler's again"


def test_calm_gives_everyone_their_own_role_and_a_relapse_makes_it_wait_longer():
    """After CALM_S without need, workers return to their own role; the time grows if help is soon needed again."""
    office = pd(1, 2)
    office.load("p0", waiting=4000.0)
    office.run(10.0)
    office.load("p0")
    assert set(office.run(CALM_S * 0.9).values()) == {"both"}
    assert office.run(CALM_S * 0.6) == {"p0": "prefill", "d0": "decode", "d1": "decode"}
    office.load("p0", waiting=4000.0)
    office.run(10.0)
    office.load("p0")
    assert set(office.run(CALM_S * 1.5).values()) == {"both"}, "help was needed again soon"
    assert office.run(CALM_S * 1.5) == {"p0": "prefill", "d0": "decode", "d1": "decode"}


def test_calm_leaves_the_last_of_a_side_where_it_is():
    """A worker that took over a role with no other worker keeps it."""
    office = pd(1, 1)
    office.run(1.0)
    office.lose("p0")
    assert office.run(5 * CALM_S) == {"d0": "both"}


def test_a_scheduler_that_may_not_decide_never_wakes():
    """With fixed roles nothing changes, and no deadline is set."""
    office = pd(1, 1)
    office.roles = Roles()
    office.load("p0", waiting=9000.0)
    office.run(10.0)
    assert office.said == []
    assert office.roles.deadline == float("inf")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_load_somebody_serves_and_operators_win(data):
    """Under any loads and operators' choices both roles stay served, and no choice is overruled."""
    roles = st.sampled_from(("prefill", "decode", "both"))
    kinds = data.draw(st.lists(roles, min_size=0, max_size=3))
    office = Office.of(("p", "prefill"), ("d", "decode"), *((f"w{i}", role) for i, role in enumerate(kinds)))
    names = st.sampled_from(sorted(office.members))
    chosen: dict[str, str] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        office.load(data.draw(names), data.draw(st.floats(0, 9000)), data.draw(st.floats(0, 90)))
        name, role = data.draw(names), data.draw(roles)
        wanted = {**office.members, name: changed(office.members[name], Change(role))}
        if data.draw(st.integers(0, 3)) == 0 and pairs([SHARD, *wanted.values()]):
            office.by_hand(name, role)
            chosen[name] = role
        now = office.run(data.draw(st.sampled_from((0.5, 3.0, 40.0))))
        assert {one: now[one] for one in chosen} == chosen
        assert office.served
        for member in office.members.values():
            assert member.role in (member.role_configured, "both") or member.role_by == HAND


# ---- in virtual time ------------------------------------------------------------------------------------------


def shifted(kind: str, roles: str) -> Report:
    """A simulation of four instances on one shard, with a load that shifts from long prompts to long answers."""
    sessions = tuple(generated("shifting", rate=20, requests=200, seed=3))
    return simulate(Run(layout=fixed(kind, 4, pages=20_000, shared=True, roles=roles), sessions=sessions))


def test_roles_that_follow_the_load_rescue_a_fixed_layout():
    """Automatic roles make a fixed layout much faster under a shifting load, about as fast as workers that do both."""
    layout, auto, both = shifted("2P2D", "fixed"), shifted("2P2D", "auto"), shifted("colocated", "fixed")
    assert auto.ttft_s.mean < layout.ttft_s.mean / 3
    assert auto.jct_s.mean < layout.jct_s.mean * 0.85
    assert auto.jct_s.mean < both.jct_s.mean * 1.03
    assert auto.jct_s.p99 < both.jct_s.p99 * 1.05
    assert attrs.evolve(shifted("colocated", "auto"), events=0) == attrs.evolve(both, events=0)
