"""The commands as users run them: what they print, what they refuse, and what they load at the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from log_lines import LIFE, line
from memserve import __version__, cli
from memserve.commands import status
from memserve.errors import UserError

MEMBERS = [
    {
        "id": "p0.00000001",
        "kind": "PrefillWorker",
        "endpoint": "ipc://x",
        "pid": 12,
        "state": "ready",
        "role": "prefill",
        "role_by": "hand",
        "role_wanted": "both",
        "joined": True,
        "site": {"key": "5a1e0c77d3b2", "cores": 2.0, "threads": 2.0},
        "shard": "s0",
        "load": {"requests_running": 2.0, "requests_waiting": 1.0},
    },
    {
        "id": "s0.00000002",
        "kind": "MemPoolShard",
        "endpoint": "ipc://y",
        "pid": 13,
        "state": "ready",
        "role": "",
        "shard": "",
        "load": {"pages_total": 100.0, "pages_free": 60.0, "pages_indexed": 30.0, "pages_evictable": 25.0},
    },
]


@pytest.fixture
def logs(tmp_path) -> Path:
    """A logging directory with one run in it."""
    folder = tmp_path / "logs" / "run1"
    folder.mkdir(parents=True)
    for record in (*LIFE, line(60, "d0", "lease expired", "warning")):
        with (folder / f"{record['actor'].partition('.')[0]}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
    return folder.parent


@pytest.fixture
def cluster():
    """A server that answers GET /cluster and records POSTs in ``asked``; keys that it requires go into ``keys``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = not self.server.keys or self.headers.get("Authorization") in self.server.keys
            body = json.dumps({"members": MEMBERS} if self.path == "/cluster" else {}).encode()
            self.send_response(200 if allowed else 401)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            asked = self.rfile.read(int(self.headers["Content-Length"]))
            self.server.asked.append((self.path, self.headers["Content-Type"], json.loads(asked)))
            error = {"error": {"message": "no worker is called 'x9'; there are: p0"}}
            self.send_response(404 if self.path.endswith("x9") else 200)
            self.end_headers()
            self.wfile.write(json.dumps(error if self.path.endswith("x9") else {}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.keys, server.asked = [], []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_logs_are_shown_in_order_and_filtered(logs, capsys):
    """`memserve logs` shows lines in order of time, filtered by actor and level."""
    assert cli.run(["logs", str(logs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert "request received abc1" in lines[0]
    assert cli.run(["logs", str(logs), "--actor", "d0", "--level", "warning", "--json"]) == 0
    (only,) = capsys.readouterr().out.splitlines()
    assert json.loads(only)["event"] == "lease expired"


def test_logs_timeline_and_summary_for_people_and_machines(logs, capsys):
    """`memserve logs` shows a request's timeline and a summary, as text and as JSON."""
    assert cli.run(["logs", str(logs), "--request", "ab", "--timeline"]) == 0
    shown = capsys.readouterr().out
    assert "request abc1: 40.0 ms" in shown
    assert "█" in shown
    assert cli.run(["logs", str(logs), "--request", "ab", "--timeline", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["moments"]) == 8
    assert cli.run(["logs", str(logs), "--summary"]) == 0
    shown = capsys.readouterr().out
    assert "1 received, 1 finished, 0 unfinished" in shown
    assert "25 of them cached (25.0%)" in shown
    assert cli.run(["logs", str(logs), "--summary", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "run1"


def test_a_terminal_that_lacks_a_character_gets_its_number(logs):
    """If it failed, a bar of a timeline, or one letter in an actor's last words, would end the command, or the cluster."""
    command = [sys.executable, "-m", "memserve", "logs", str(logs), "--request", "ab", "--timeline"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2588" in done.stdout


def test_damage_is_said_on_stderr(logs, capsys):
    """Corrupt log lines are skipped and counted on stderr."""
    with (logs / "run1" / "p0.jsonl").open("a") as file:
        file.write("garbage\n")
    assert cli.run(["logs", str(logs), "--summary"]) == 0
    assert capsys.readouterr().err == "passed over 1 corrupt line\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["logs", "/nowhere"], "there is no log directory /nowhere"),
        (["logs", "--timeline"], "--timeline needs the --request"),
        (["logs", "--summary", "--follow"], "exclude each other"),
        (["logs", "--level", "loud"], "loud"),
        (["check", "-c", "dmo"], "did you mean demo?"),
        (["check", "--set", "frontend.prt=1"], "did you mean port?"),
        (["up", "-c", "dmo"], "did you mean demo?"),
        (["up", "cluster.toml"], "-c cluster.toml"),
        (["up", "--port", "8000"], "Unknown option: --port. A file is given with -c"),
        (["status", "--url", "localhost:1"], "--url must begin with http://"),
        (["status", "--url", "http://[::1"], "--url must be an address such as http://127.0.0.1:8080"),
        (["status", "--url", "http://127.0.0.1:1"], "no answer at http://127.0.0.1:1"),
        (["status", "--log-dir", "~nobody-x"], "logging.dir: '~nobody-x' begins with ~"),
        (["key", "~nobody-x/key"], "FILE: '~nobody-x/key' begins with ~"),
        (["stauts"], "status"),
        (["logs", "--actr", "x"], "--actor"),
    ],
)
def test_mistakes_exit_2_with_one_clear_text(words, said, capsys):
    """Wrong arguments exit with status 2, a clear text on stderr and no traceback."""
    assert cli.run(words) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert "Traceback" not in err
    assert out == ""


def test_check_prints_every_setting_and_every_decision(capsys):
    """`memserve check` prints every setting and decision, without API keys."""
    assert cli.run(["check", "--set", "frontend.port=8123", "--set", 'frontend.api_keys=["s3cret"]']) == 0
    shown = capsys.readouterr().out
    for expected in (
        "frontend.port",
        "8123",
        "worker[1].role",
        "shard.s0",
        "2912 pages",
        "runtime directory",
    ):
        assert expected in shown
    assert "s3cret" not in shown
    assert cli.run(["check", "--set", 'frontend.cors_origins=["*"]']) == 0
    assert "web page" in " ".join(capsys.readouterr().out.split())


def test_status_lists_the_actors(cluster, capsys):
    """`memserve status` lists the actors with roles, sites, states and loads, as text and as JSON."""
    assert cli.run(["status", "--url", cluster.url]) == 0
    head, shard, worker = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "kind", "role", "site", "pid", "state", "load"]
    assert "s0" in shard
    assert "pages 15 in use, 30 cached, 60 free of 100" in shard
    assert [one for one in worker.split("  ") if one][:4] == [
        "p0",
        "PrefillWorker",
        "prefill by hand, wanted: both",
        "5a1e0c77d3b2",
    ]
    assert "ready, joined" in worker
    assert "requests running 2, requests waiting 1" in worker
    assert cli.run(["status", "--url", cluster.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"members": MEMBERS}


def test_status_finds_the_cluster_of_this_directory_and_its_key(cluster, capsys, monkeypatch, tmp_path):
    """`memserve status` finds the address and key of the cluster that logs to this directory."""
    cluster.keys = ["Bearer k1"]
    info = {"pid": 1, "url": cluster.url, "resolved": {"config": {"frontend": {"api_keys": ["k1"]}}}}
    monkeypatch.setattr("memserve.processes.place.find_running", lambda log_dir: info)
    assert cli.run(["status", "--log-dir", str(tmp_path)]) == 0
    capsys.readouterr()
    assert cli.run(["status", "--url", cluster.url]) == 2
    assert "requires a key: give --api-key" in capsys.readouterr().err
    assert cli.run(["status", "--url", cluster.url, "--api-key", "k1"]) == 0


def test_who_owns_the_cluster_may_administrate_it(monkeypatch, tmp_path):
    """Commands on the cluster of this directory use an administrator's key; a refusal is passed on."""
    keys = {"api_keys": ["user", "boss"], "admin_keys": ["boss"]}
    info = {"pid": 1, "url": "http://here", "resolved": {"config": {"frontend": keys}}}
    monkeypatch.setattr("memserve.processes.place.find_running", lambda log_dir: info)
    assert status.Target.find(None, None, tmp_path).api_key == "boss"
    assert status.Target.find(None, "mine", tmp_path).api_key == "mine"
    body = b'{"error": {"message": "This key may not change workers"}}'
    assert status.refusal("http://here", 403, body) == "This key may not change workers"


def test_role_and_drain_ask_the_cluster_and_pass_on_its_refusals(cluster, capsys):
    """`memserve role` and `memserve drain` send the change to the cluster and show its refusals."""
    assert cli.run(["role", "p0", "both", "--url", cluster.url]) == 0
    assert cli.run(["drain", "gone", "--url", cluster.url]) == 0
    assert cluster.asked == [
        ("/cluster/p0", "application/json", {"role": "both"}),
        ("/cluster/gone", "application/json", {"drain": True}),
    ]
    assert "gone has left" in capsys.readouterr().out
    assert cli.run(["role", "x9", "both", "--url", cluster.url]) == 2
    assert "there are: p0" in capsys.readouterr().err
    assert cli.run(["role", "p0", "boss", "--url", cluster.url]) == 2


def test_status_without_a_cluster_says_so(monkeypatch, tmp_path):
    """Without a cluster, or before it serves, `memserve status` says which of the two it is."""
    monkeypatch.setattr("memserve.processes.place.find_running", lambda log_dir: None)
    with pytest.raises(UserError, match="no running memserve logs to"):
        status.Target.find(None, None, tmp_path)
    monkeypatch.setattr("memserve.processes.place.find_running", lambda log_dir: {"pid": 7, "url": None})
    with pytest.raises(UserError, match=r"pid 7\) but is not serving yet"):
        status.Target.find(None, None, tmp_path)


def test_ctrl_c_is_130_and_a_closed_pipe_is_quiet(monkeypatch, logs):
    """Ctrl-C exits with 130, and a closed pipe gives no traceback."""
    monkeypatch.setattr("memserve.inspect.find_run", lambda place: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.run(["logs"]) == 130
    command = f"{sys.executable} -m memserve logs {logs} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 141)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("to", "status", "said"),
    [
        (">&-", 0, ""),
        ("> /dev/full", 2, "cannot write: No space left on device\n"),
        ("| cat > out", 0, ""),
    ],
)
def test_whatever_becomes_of_the_output_there_is_no_traceback(to, status, said, logs, tmp_path):
    """If it failed, a full disk, a closed stdout or a terminal without box characters would print a traceback."""
    command = (
        f"{sys.executable} -m memserve logs {logs} --request abc1 --timeline {to}; exit ${{PIPESTATUS[0]}}"
    )
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=env, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (status, said)


def test_version(capsys):
    """`memserve version` prints the version."""
    assert cli.run(["version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_the_command_line_loads_nothing_heavy():
    """The command line does not load torch and the like, and actors do not load the command line's libraries."""
    code = (
        "import sys, memserve.cli; memserve.cli.run(['--help']);"
        "print(*sorted({'torch','numpy','zmq','trio','starlette'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.splitlines()[-1] == ""
    code = "import sys, memserve.__main__; print(*sorted({'cyclopts', 'rich', 'cattrs'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
