"""The load generator's command line, end to end against the stub on loopback, and its errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadgen import cli, rundir, stub, sweep
from loadgen.errors import LoadgenError
from loadgen.options import ArrivalOptions, RunOptions, WorkloadOptions

ROOT = Path(__file__).parents[1]
SMALL = [
    "--groups",
    "2",
    "--group-size",
    "3",
    "--prefix-tokens",
    "32",
    "--question-tokens",
    "8",
    "--output-tokens",
    "4",
]


@pytest.fixture(scope="module")
def url():
    """The address of a stub in its own process."""
    code = "import trio; from loadgen.stub import Stub, Behaviour\n"
    code += "async def main():\n async with trio.open_nursery() as n:\n"
    code += "  print(await n.start(Stub(Behaviour(token_s=0.005)).listen), flush=True)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code + "trio.run(main)"], stdout=subprocess.PIPE, text=True, env=environment()
    )
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.kill()
    process.wait()
    process.stdout.close()


def environment() -> dict[str, str]:
    """The environment of this process, with the packages of the checkout."""
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}


def test_a_run_a_sweep_a_comparison_and_a_report(url, tmp_path, capsys):
    """Two runs are made, compared and reported."""
    for name in ("a", "b"):
        words = [
            "run",
            "shared-prefix",
            *SMALL,
            "--url",
            url,
            "--clients",
            "2",
            "--out",
            str(tmp_path / name),
        ]
        assert cli.run([*words, "--quiet", "--slo", "ttft=1000", "--tenant", "x", "--tenant", "y"]) == 0
    shown = capsys.readouterr().out
    assert "6 of 6 measured requests answered" in shown and "goodput" in shown and "tenant x" in shown
    assert (
        cli.run(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c.html")]) == 0
    )
    assert "time to first token p50" in capsys.readouterr().out
    assert cli.run(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "--replicates", "50"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["runs"] == ["a", "b"]
    assert cli.run(["report", str(tmp_path / "a"), "--out", str(tmp_path / "again.html")]) == 0
    pages = [tmp_path / "a" / "report.html", tmp_path / "c.html", tmp_path / "again.html"]
    assert all(page.read_text().count("<svg") >= 5 for page in pages)
    assert pages[0].read_text() == pages[2].read_text()


def test_a_sweep_writes_its_points_and_its_page(url, tmp_path, capsys):
    """A sweep writes its points and its report, each point with its own salt, and sweeps can be compared."""
    words = [
        "sweep",
        "shared-prefix",
        *SMALL,
        "--url",
        url,
        "--clients-list",
        "1,3",
        "--pause-s",
        "0",
        "--quiet",
    ]
    assert cli.run([*words, "--out", str(tmp_path / "s")]) == 0
    runs = rundir.points(tmp_path / "s")
    assert [run.summary["arrivals"]["clients"] for run in runs] == [1, 3]
    # Each point begins with a cold cache, and finds the same share in it.
    assert [run.summary["identity"]["content"].split(",")[1] for run in runs] == [" salt 'p1'", " salt 'p2'"]
    assert (tmp_path / "s" / "report.html").read_text().count("<svg") == 5
    assert cli.run(["report", str(tmp_path / "s")]) == 0
    with pytest.raises(LoadgenError, match="different workloads"):
        cli.app(
            ["compare", str(tmp_path / "s" / "point-01"), str(tmp_path / "s" / "point-02")],
            exit_on_error=False,
        )
    capsys.readouterr()
    assert (
        cli.run(["compare", str(tmp_path / "s"), str(tmp_path / "s"), "--out", str(tmp_path / "c.html")]) == 0
    )
    assert capsys.readouterr().out.count("requests answered") == 2


def test_ctrl_c_keeps_what_was_measured(url, tmp_path):
    """Ctrl-C ends a run with status 130 and keeps what was measured."""
    words = [
        "run",
        "shared-prefix",
        *SMALL,
        "--think-s",
        "1000",
        "--turns",
        "2",
        "--url",
        url,
        "--clients",
        "2",
    ]
    out = tmp_path / "r"
    process = subprocess.Popen(
        [sys.executable, "-m", "loadgen", *words, "--out", str(out)], env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not (out / rundir.REQUESTS).exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    shown, complaints = process.communicate(timeout=30)
    assert process.returncode == 130, complaints
    assert "The run was stopped" in shown.replace("\n", " ")
    assert len(rundir.read(out).records) == 2


def test_a_closed_pipe_is_quiet_and_pages_are_utf8(url, tmp_path):
    """If it failed, piping into head would print a traceback, or a locale without a sign would lose the report."""
    words = f"run shared-prefix {' '.join(SMALL)} --clients 2 --url {url} --quiet --slo ttft=900 --out"
    env = {**environment(), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = f"{sys.executable} -m loadgen {words} a && {sys.executable} -m loadgen compare a a --json | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=env, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (141, "")
    assert "≤" in (tmp_path / "a" / rundir.REPORT).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["run", "chat", "--rate", "1"], "--data: chat needs a file"),
        (["run", "shared-prefix", "--data", "x", "--rate", "1"], "reads no file"),
        (["run", "chat", "--data", "none.json", "--rate", "1"], "none.json: cannot be read"),
        (["run", "shared-prefix"], "say how sessions begin"),
        (["run", "shared-prefix", "--rate", "1", "--clients", "1"], "exclude each other"),
        (["run", "shared-prefix", "--rate", "-1"], "--rate: must be above 0"),
        (["run", "shared-prefix", "--arrival", "gamma"], "--arrival gamma: needs --rate"),
        (["run", "shared-prefix", "--arrival", "trace"], "this workload has no times"),
        (["run", "shared-prefix", "--clients", "1", "--slo", "fast"], "--slo: must be ttft"),
        (["run", "shared-prefix", "--clients", "1", "--body", "a"], "--body: must be FIELD=JSON"),
        (["run", "shared-prefix", "--clients", "1", "--vocabulary", "9"], "--vocabulary: must be LOW:HIGH"),
        (
            ["run", "shared-prefix", "--clients", "1", "--tenant", "a", "--tenant", "a"],
            "--tenant: names must",
        ),
        (["run", "shared-prefix", "--clients", "1", "--tenant", "a=env:NO_SUCH"], "has no NO_SUCH"),
        (["run", "shared-prefix", "--clients", "1", "--groups", "0"], "--groups: must be 1 or more, not 0"),
        (["run", "shared-prefix", "--clients", "1", "--prefix-tokens", "-5"], "must be 0 or more, not -5"),
        (["run", "shared-prefix", "--clients", "1", "--output-tokens-max", "0"], "must be 1 or more, not 0"),
        (["run", "prefix-share", "--clients", "1", "--share", "2"], "--share: must be from 0 to 1"),
        (["run", "shared-prefix", "--clients", "1", "--corpus", "x"], "needs --prompts text"),
        (["run", "shared-prefix", "--clients", "1", "--reference", "nowhere"], "cannot be read"),
        (["run", "dancing"], "dancing"),
        (["run", "shared-prefix", "--no-such-option"], "--no-such-option"),
        (["sweep", "shared-prefix"], "give one of --rates"),
        (["sweep", "shared-prefix", "--rates", "a"], "must be numbers with commas"),
        (
            ["sweep", "shared-prefix", "--shares", "0.5", "--clients", "1"],
            "belongs to the workload prefix-share",
        ),
        (["sweep", "shared-prefix", "--rates", "1", "--clients", "1"], "leave --rate and --clients out"),
        (["sweep", "shared-prefix", "--clients-list", "1,nan"], "must be numbers with commas"),
        (["sweep", "shared-prefix", "--clients-list", "4,0"], "--clients: must be 1 or more"),
        (["compare", "nowhere"], "two runs or more"),
        (["compare", "nowhere", "elsewhere", "--replicates", "0"], "--replicates: must be 40 or more"),
        (["compare", "nowhere", "elsewhere"], "cannot be read"),
        (["report", "nowhere"], "cannot be read"),
    ],
)
def test_mistakes_are_explained_in_one_line(words, complaint, capsys, tmp_path, monkeypatch, url):
    """Wrong arguments are explained in one line without a traceback."""
    monkeypatch.chdir(tmp_path)
    more = ["--url", url, "--quiet"] if words[0] in ("run", "sweep") else []
    assert cli.run([*words, *more]) == cli.STATUS_USER_ERROR
    error = capsys.readouterr().err
    assert complaint in error and "Traceback" not in error


def test_a_stub_on_a_port_in_use_is_one_clear_error(url, monkeypatch, capsys):
    """If it failed, a second stub would be a traceback."""
    monkeypatch.setattr("sys.argv", ["stub", "--port", url.rpartition(":")[2]])
    with pytest.raises(SystemExit, match="2"):
        stub.main()
    assert "Address already in use" in capsys.readouterr().err


def test_a_sweep_has_the_same_salts_each_time():
    """The salts of a sweep's points follow from its own salt, so that sweeps are comparable."""
    given = RunOptions(
        kind="prefix-share", workload=WorkloadOptions(salt="x"), arrivals=ArrivalOptions(clients=1)
    )
    plan = sweep.plan(given, "", "", "0,0.5")
    assert [(one.workload.share, one.workload.salt) for one in plan.points] == [(0.0, "xp1"), (0.5, "xp2")]
    same = sweep.plan(given, "", "", "0,0.5", same_salt=True)
    assert [one.workload.salt for one in same.points] == ["x", "x"]
