"""Whole runs of the load generator against its stub server, in virtual time over memory streams and over loopback."""

from __future__ import annotations

import io
from pathlib import Path

import attrs
import orjson
import pytest
import trio
from rich.console import Console

from loadgen import api, records, rundir, terminal
from loadgen.errors import LoadgenError
from loadgen.options import ArrivalOptions, MeasureOptions, ServerOptions, WorkloadOptions
from loadgen.stub import Behaviour, Stub
from loadgen_stub import SMALL, on_loopback, options, played, with_


async def test_times_are_those_of_the_server(autojump_clock):
    """Latencies and rates that are reported are those of the server."""
    run = await played(with_(ttft_s=0.5, token_s=0.1), options())
    figures = run.summary["figures"]
    assert figures["requests"] == figures["ok"] == 6
    assert figures["ttft_ms"]["p50"] == pytest.approx(500)
    assert figures["tpot_ms"]["p99"] == pytest.approx(100)
    assert figures["itl_ms"]["count"] == 6 * 7
    assert figures["jct_ms"]["mean"] == pytest.approx(500 + 7 * 100)
    assert figures["throughput"]["output_tokens_per_s"] == pytest.approx(8 / 1.2)
    assert figures["throughput"]["requests_per_s"] == pytest.approx(1 / 1.2)
    assert not run.summary["warnings"]


async def test_several_tokens_in_one_event_are_all_counted(autojump_clock):
    """All tokens of an event count, in numbers and in times per token."""
    run = await played(with_(ttft_s=1.0, token_s=0.1, tokens_per_event=4), options())
    record = run.records[0]
    assert len(record.event_ms) == 2 and record.output_tokens == 8
    assert record.tpot_ms == pytest.approx(400 / 7), "nothing says how many tokens the first event had"
    for said in (
        "return_token_ids=true",
        'stream_options={"include_usage":true,"continuous_usage_stats":true}',
    ):
        server = ServerOptions(model="stub", body=(said,))
        run = await played(with_(ttft_s=1.0, token_s=0.1, tokens_per_event=4), options(server=server))
        assert run.records[0].tpot_ms == pytest.approx(400 / 4)
    assert run.summary["figures"]["output_tokens"]["mean"] == 8


async def test_cached_tokens_are_those_of_the_usage(autojump_clock):
    """The share of cached tokens is computed from the usage that the server reports."""
    run = await played(with_(), options())
    # Six prompts of 80 tokens; all but the first of each group find the prefix of 64.
    assert run.summary["figures"]["cached_share"] == pytest.approx(4 * 64 / (6 * 80))


async def test_an_open_loop_does_not_wait_for_answers(autojump_clock):
    """In an open loop requests are sent at their times, however slow the server is."""
    arrivals = ArrivalOptions(rate=2.0, arrival="constant")
    run = await played(with_(ttft_s=100.0), options(arrivals=arrivals))
    sent = sorted(one.sent_s for one in run.records)
    assert sent == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
    assert max(one.lag_s for one in run.records) == pytest.approx(0)


async def test_a_closed_loop_has_so_many_requests_under_way(autojump_clock):
    """A closed loop has as many requests under way as it has clients."""
    run = await played(with_(ttft_s=1.0), options(arrivals=ArrivalOptions(clients=3)))
    assert sorted(round(one.sent_s) for one in run.records) == [0, 0, 0, 1, 1, 1]


async def test_a_turn_waits_for_the_answer_and_the_time_to_think(autojump_clock):
    """The next turn is sent after the answer and the time to think."""
    workload = attrs.evolve(SMALL, groups=1, group_size=1, turns=3, think_s=2.0)
    run = await played(with_(ttft_s=1.0), options(workload))
    assert [one.turn for one in run.records] == [0, 1, 2]
    assert [one.sent_s for one in run.records] == pytest.approx([0.0, 3.0, 6.0])


async def test_a_conversation_carries_the_recorded_or_the_own_answer(autojump_clock):
    """The next prompt continues the last with the recorded answer or the server's own one, as chosen."""
    workload = attrs.evolve(SMALL, groups=1, group_size=1, turns=2)
    stub = with_()
    await played(stub, options(workload))
    first, second = (one["prompt"] for one in stub.bodies)
    assert len(first) == 64 + 16 and second[:80] == first and len(second) == 80 + 8 + 16
    assert "return_token_ids" not in stub.bodies[0]
    recorded = second[80:88]
    stub = with_()
    await played(stub, options(attrs.evolve(workload, answers="own")))
    second = stub.bodies[1]["prompt"]
    assert stub.bodies[0]["return_token_ids"] is True
    assert second[:80] == first and second[80:88] != recorded


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("refuse_every", "http 429"), ("cut_every", "incomplete"), ("error_every", "server error")],
)
async def test_errors_are_counted_by_kind(autojump_clock, fault, kind):
    """Refusals, cut streams and error events are counted by kind, with an example and a warning."""
    run = await played(with_(token_s=0.1, **{fault: 3}), options())
    figures = run.summary["figures"]
    assert figures["ok"] == 4
    assert figures["errors"][kind]["count"] == 2
    assert figures["errors"][kind]["example"]
    assert any("2 of 6 measured requests failed" in one for one in run.summary["warnings"])


async def test_a_silent_stream_has_stalled(autojump_clock):
    """A stream that is silent for longer than stall_s counts as stalled."""
    given = options(measures=MeasureOptions(stall_s=2.0))
    run = await played(with_(token_s=0.1, stall_every=2, stall_s=3.0), given)
    assert run.summary["figures"]["stalled"] == {"after_s": 2.0, "requests": 3}


async def test_a_request_without_end_is_given_up(autojump_clock):
    """A request that takes longer than timeout_s is given up."""
    run = await played(with_(ttft_s=1e6), options(server=ServerOptions(model="stub", timeout_s=30.0)))
    assert run.summary["figures"]["errors"]["timeout"]["count"] == 6


async def test_a_run_ends_after_its_duration_and_its_drain(autojump_clock):
    """A run ends after its duration and drain, and what is open then counts as unfinished."""
    arrivals = ArrivalOptions(rate=1.0, arrival="constant", duration_s=4.5, drain_s=10.0)
    run = await played(with_(ttft_s=12.0), options(arrivals=arrivals))
    ends = {one.session: one.error for one in run.records}
    assert sorted(ends.values()) == ["", "", "unfinished", "unfinished"]
    assert run.summary["outcome"]["ended_s"] == pytest.approx(14.5)


async def test_sessions_above_the_limit_are_counted_and_not_played(autojump_clock):
    """Sessions beyond in_flight_max are not played, but counted and reported."""
    arrivals = ArrivalOptions(rate=1000.0, arrival="constant", in_flight_max=2)
    run = await played(with_(ttft_s=10.0), options(arrivals=arrivals))
    assert len(run.records) == 2
    assert (run.summary["outcome"]["overflowed"], run.summary["outcome"]["abandoned"]) == (4, 4)
    assert "4 sessions were not played: 2 were under way." in run.summary["warnings"]


async def test_the_terminal_shows_how_a_run_goes(autojump_clock):
    """The terminal shows progress, errors and latencies during a run."""
    shown = []

    async def watch(progress):
        await trio.sleep(3.05)
        live = terminal.Live(options())
        console = Console(width=100, file=io.StringIO())
        console.print(live.page(progress, 3.05))
        shown.extend([console.file.getvalue(), live.line(progress, 3.55)])

    run = await played(with_(ttft_s=1.0, refuse_every=3), options(), watch=watch)
    page, line = shown
    assert " 5 of 6" in page and "http 429" in page
    assert "ok 3" in line and "failed 1" in line and "TTFT p50/p99 1,000/1,000 ms" in line
    assert "http 429: 2, for example: too much to do" in terminal.figure_lines(run.summary)


async def test_the_warm_up_is_not_measured(autojump_clock):
    """Requests of the warm-up are recorded and not part of the figures."""
    arrivals = ArrivalOptions(rate=1.0, arrival="constant", warmup_s=2.5)
    run = await played(with_(ttft_s=0.2), options(arrivals=arrivals))
    assert len(run.records) == 6
    assert run.summary["figures"]["requests"] == 4


async def test_a_generator_that_fell_behind_says_so(autojump_clock):
    """A generator that sends too late warns that it fell behind."""

    class Slow(Stub):
        def _match(self, *of):
            autojump_clock.jump(0.3)  # what a busy machine does to the generator
            return super()._match(*of)

    run = await played(Slow(Behaviour(ttft_s=0.01)), options(arrivals=ArrivalOptions(rate=100.0)))
    assert run.summary["lag"]["fell_behind"]
    assert run.summary["warnings"][0].startswith("The generator fell behind")


async def test_every_moment_of_a_busy_generator_is_counted(autojump_clock):
    """If it failed, a generator that stops for half a second now and then would vouch for its latencies."""

    class Stopping(Stub):
        def _match(self, *of):
            if self.requests % 4 == 0:
                autojump_clock.jump(0.5)  # 6 times in 24 s: an eighth of the run
            return super()._match(*of)

    workload = attrs.evolve(SMALL, groups=1, group_size=24)
    run = await played(Stopping(Behaviour(ttft_s=0.8)), options(workload))
    assert run.summary["lag"]["tick_ms"]["p99"] > 400
    assert run.summary["lag"]["fell_behind"]


async def test_tenants_have_figures_of_their_own(autojump_clock):
    """Each tenant has its own figures, and reports do not contain keys."""
    workload = attrs.evolve(SMALL, group_size=10, tenants=("a=ka", "b=kb"))
    run = await played(with_(api_keys=("ka", "kb")), options(workload))
    tenants = run.summary["tenants"]
    assert set(tenants) == {"a", "b"}
    assert sum(one["requests"] for one in tenants.values()) == run.summary["figures"]["requests"] == 20
    assert "ka" not in orjson.dumps(run.summary).decode()


async def test_the_model_is_asked_for_with_the_key_of_a_tenant(autojump_clock):
    """If it failed, tenants of a server that requires a key could not be played without --model."""
    workload = attrs.evolve(SMALL, tenants=("a=ka", "b=kb"))
    run = await played(with_(api_keys=("ka", "kb")), options(workload, server=ServerOptions()))
    assert run.summary["server"]["model"] == "stub"


async def test_answers_are_checked_against_another_run(autojump_clock, tmp_path):
    """Answers are compared with those of a reference run, where their prompts were the same."""
    workload = attrs.evolve(SMALL, turns=2)
    keep = MeasureOptions(keep_answers=True)
    await played(with_(), options(workload, measures=keep), tmp_path / "reference")
    checked = MeasureOptions(reference=tmp_path / "reference", keep_answers=True)
    again = await played(with_(token_s=0.1), options(workload, measures=checked))
    assert again.summary["reference"]["same"] == 12
    wrong = await played(with_(answer_seed=1), options(workload, measures=checked))
    assert wrong.summary["reference"]["different"] == 12
    assert wrong.summary["reference"]["examples"][0]["at"] is not None
    diverging = options(attrs.evolve(workload, answers="own"), measures=checked)
    assert (await played(with_(), diverging)).summary["reference"]["other_prompt"] == 6


async def test_what_is_written_is_what_was_measured(tmp_path, autojump_clock):
    """Written records and summaries read back as they were, and a used directory is refused."""
    run = await played(with_(ttft_s=0.1), options(), tmp_path / "r")
    back = rundir.read(tmp_path / "r")
    assert back.records == run.records
    assert back.summary == orjson.loads(orjson.dumps(run.summary))
    assert records.from_json(orjson.loads(run.records[0].to_json())) == run.records[0]
    with pytest.raises(LoadgenError, match="holds a run already"):
        rundir.fresh(tmp_path / "r")
    wrong = pytest.raises(LoadgenError, match="--out /proc/self: cannot be written")
    with wrong, rundir.journal(Path("/proc/self")):
        pass


async def test_over_loopback_a_thousand_events_arrive():
    """A run over real sockets receives every event."""
    stub = with_(tokens_per_event=1)
    workload = attrs.evolve(SMALL, groups=4, group_size=8, output_tokens=40)
    async with on_loopback(stub) as url:
        given = options(workload, ArrivalOptions(clients=8), ServerOptions(url=url))
        run = await api.play(given)
    assert run.summary["figures"]["ok"] == 32
    assert run.summary["server"]["model"] == "stub"
    assert sum(len(one.event_ms) for one in run.records) == 32 * 40


async def test_chats_are_sent_as_messages():
    """With the chat endpoint, conversations are sent as messages."""
    stub = with_()
    workload = attrs.evolve(SMALL, groups=1, group_size=1, turns=2)
    async with on_loopback(stub) as url:
        await api.play(
            options(workload, server=ServerOptions(url=f"{url}/v1", endpoint="chat", ignore_eos=False))
        )
    second = stub.bodies[1]
    assert [one["role"] for one in second["messages"]] == ["user", "assistant", "user"]
    assert "ignore_eos" not in second and second["max_tokens"] == 8


async def test_tokens_that_were_not_reported_are_a_warning(autojump_clock, monkeypatch):
    """If it failed, a rate that counts each event as one token would pass for the server's."""
    monkeypatch.setattr("loadgen.stub._usage", lambda *_: None)
    run = await played(with_(tokens_per_event=4), options())
    assert run.summary["figures"]["uncounted_answers"] == 6
    assert run.summary["warnings"][0] == (
        "6 answers came without a count of their tokens: each of their events counts as one token."
    )
    ids = ServerOptions(model="stub", token_ids=True)
    assert not (await played(with_(tokens_per_event=4), options(server=ids))).summary["warnings"]


async def test_a_turn_without_text_does_not_end_the_run(tmp_path):
    """If it failed, one empty message in a published file would end a run of thousands of requests."""
    said = [{"from": "human", "value": ""}, {"from": "gpt", "value": "Hello."}]
    path = tmp_path / "chats.json"
    path.write_bytes(orjson.dumps([{"id": "a", "conversations": said}]))
    stub = with_()
    async with on_loopback(stub) as url:
        given = options(
            WorkloadOptions(data=(path,)), server=ServerOptions(url=url, endpoint="chat"), kind="chat"
        )
        run = await api.play(given)
    assert len(run.records) == 1
    assert stub.bodies[0]["messages"] == [{"role": "user", "content": ""}]


async def test_a_name_with_several_addresses_is_tried_until_one_answers(monkeypatch):
    """If it failed, localhost would not reach a server that listens on 127.0.0.1 only."""
    look_up = trio.socket.getaddrinfo

    async def both(host, port, *more, **flags):
        found = await look_up("127.0.0.1", port, type=trio.socket.SOCK_STREAM)
        unreachable = (trio.socket.AF_INET6, trio.socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        return [unreachable, *found]

    async with on_loopback(with_()) as url:
        monkeypatch.setattr(trio.socket, "getaddrinfo", both)
        run = await api.play(options(server=ServerOptions(url=url.replace("127.0.0.1", "localhost"))))
    assert run.summary["figures"]["ok"] == 6


async def test_a_server_that_is_not_there_is_one_clear_error():
    """A server that does not answer is one clear error."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    await listeners[0].aclose()
    with pytest.raises(LoadgenError, match=f"127.0.0.1:{port}/v1/models does not answer"):
        await api.play(options(server=ServerOptions(url=f"http://127.0.0.1:{port}")))
