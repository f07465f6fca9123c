"""How ``make bench-peers`` starts memserve and its peers: the same weights, the same cores, bfloat16.

One server runs at a time. Each gets the settings that its own documentation recommends for a machine without
a GPU. Settings that differ from the defaults are explained where they are made.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

ROOT = Path(__file__).parent.parent
READY_S = 600.0
"""Longest time that a server may take to start, in seconds: vLLM compiles at its first start."""
STOP_S = 30.0
CONTEXT = 8192
"""Maximum tokens of one sequence: the model's own limit."""
SLOTS = 8
"""Sequences that llama-server runs at once: the largest concurrency of the workloads."""
KV_GIB = 2
"""Size of vLLM's KV cache in GiB: 91,000 tokens of the demo model."""


@attrs.frozen
class Server:
    """One server: how to start it, and what a request to it needs beyond OpenAI's fields."""

    name: str
    what: str
    """Version, precision and settings, for the note."""
    argv: tuple[str, ...]
    """Command line; ``{port}`` stands for the port and ``{scratch}`` for a temporary directory."""
    body: Mapping[str, Any]
    """Fields added to every request, for greedy sampling and answers that never end early."""
    model: str = ""
    """The model's name in requests; empty: the first one that /v1/models lists."""
    environment: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class Absent:
    """A peer that is not installed."""

    name: str
    why: str


def find_servers(folder: Path, cores: Sequence[int]) -> list[Server | Absent]:
    """memserve in its two single-machine layouts, and every peer in ``folder``."""
    peers = (llama_server, vllm_cpu, transformers_serve)
    return [memserve("demo"), memserve("colocated"), *(peer(folder, cores) for peer in peers)]


def memserve(config: str) -> Server:
    """This project with one of its shipped configurations, but without drafts.

    Answers to random words repeat themselves, so a server that drafts tokens would look arbitrarily fast.
    """
    command = (sys.executable, "-m", "memserve", "up", "--config", str(ROOT / "configs" / f"{config}.toml"))
    return Server(
        name="memserve" if config == "demo" else f"memserve {config}",
        what=f"configs/{config}.toml as shipped, bfloat16, without drafts",
        argv=(
            *command,
            *("--set", "frontend.port={port}", "--set", "logging.dir={scratch}", "--set", "batch.draft=0"),
        ),
        body={"temperature": 0, "ignore_eos": True},
    )


def llama_server(folder: Path, cores: Sequence[int]) -> Server | Absent:
    """llama.cpp's server."""
    program, weights = folder / "llama-server" / "bin" / "llama-server", sorted(folder.glob("models/*.gguf"))
    if not program.is_file() or not weights:
        return Absent("llama-server", f"no {program.name} with weights in the peers' folder")
    threads = str(len(cores))
    return Server(
        name="llama-server",
        what=f"llama-cpp-python {_installed(folder, 'llama-server', 'llama-cpp-python')}'s llama.cpp, BF16, -t {threads} "
        f"-np {SLOTS} -c {SLOTS * CONTEXT}",
        argv=(
            *(str(program), "--model", str(weights[0]), "--host", "127.0.0.1", "--port", "{port}"),
            *("--threads", threads, "--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT), "--no-ui"),
        ),
        body={"temperature": 0, "ignore_eos": True},
    )


def vllm_cpu(folder: Path, cores: Sequence[int]) -> Server | Absent:
    """vLLM's CPU backend. Its engine compiles for minutes at the first start and keeps the result."""
    bin, model = folder / "vllm-cpu" / "bin", _hf_model(folder)
    if not (bin / "vllm").is_file() or model is None:
        return Absent("vllm-cpu", "no environment with weights in the peers' folder")
    return Server(
        name="vllm-cpu",
        what=f"vllm-cpu {_installed(folder, 'vllm-cpu', 'vllm-cpu')}, bfloat16, cores {_ranges(cores)}, {KV_GIB} GiB of KV",
        argv=(
            *(str(bin / "vllm"), "serve", str(model), "--served-model-name", "demo", "--dtype", "bfloat16"),
            *("--host", "127.0.0.1", "--port", "{port}", "--max-model-len", str(CONTEXT)),
            *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
        ),
        body={"temperature": 0, "ignore_eos": True},
        environment={
            "PATH": f"{bin}:{os.environ['PATH']}",  # vLLM runs ninja from there
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            # By default vLLM reserves a core for its own processes; the other servers may use all cores.
            "VLLM_CPU_OMP_THREADS_BIND": _ranges(cores),
        },
    )


def transformers_serve(folder: Path, cores: Sequence[int]) -> Server | Absent:
    """transformers' own server with continuous batching.

    Its paged cache is set to 64k tokens; by default it takes all memory.
    """
    program, model = folder / "transformers" / "bin" / "transformers", _hf_model(folder)
    if not program.is_file() or model is None:
        return Absent("transformers", "no environment with weights in the peers' folder")
    # It has no ignore_eos; a generation config whose end token does not exist has the same effect.
    endless = json.dumps({"eos_token_id": -1, "do_sample": False})
    return Server(
        name="transformers",
        what=f"transformers serve {_installed(folder, 'transformers', 'transformers')}, bfloat16, --continuous-batching",
        argv=(
            *(str(program), "serve", str(model), "--continuous-batching", "--device", "cpu"),
            *("--dtype", "bfloat16", "--host", "127.0.0.1", "--port", "{port}"),
            *("--cb-block-size", "32", "--cb-num-blocks", "2048", "--cb-max-batch-tokens", "2048"),
        ),
        body={"temperature": 0, "generation_config": endless},
        model=str(model),
        environment={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(cores))},
    )


def _hf_model(folder: Path) -> Path | None:
    return next((one.parent for one in sorted(folder.glob("models/*-hf/config.json"))), None)


def _installed(folder: Path, part: str, package: str) -> str:
    """The version that install_peers.py recorded."""
    stamp = folder / f"{part}.json"
    return str(json.loads(stamp.read_text())[package]) if stamp.is_file() else "(version unknown)"


def _ranges(cores: Sequence[int]) -> str:
    """Cores in the form that vLLM takes: ``0-3`` or ``0,2``."""
    ordered = sorted(cores)
    whole = ordered == list(range(ordered[0], ordered[-1] + 1)) and len(ordered) > 1
    return f"{ordered[0]}-{ordered[-1]}" if whole else ",".join(map(str, ordered))


# ---- running one ---------------------------------------------------------------------------------------------


class NotReady(Exception):
    """A server that did not start; the message ends with the last part of its output."""


@contextmanager
def running(server: Server, log: Path, scratch: Path) -> Iterator[str]:
    """Run a server and yield its URL once /health answers 200. Its output goes to ``log``.

    It is stopped by SIGTERM; SIGKILL then ends whatever is left of its process group. Raises NotReady.
    """
    port = free_port()
    argv = [word.format(port=port, scratch=scratch) for word in server.argv]
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **server.environment},
            start_new_session=True,
        )
        try:
            wait_ready(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            stop(process)


def wait_ready(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    """Wait until ``health`` answers 200. Raises NotReady if the process ends first, or after READY_S."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NotReady(f"it ended with status {process.returncode}: {_tail(log)}")
        try:
            with urllib.request.urlopen(health, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.2)
    raise NotReady(f"it was not ready after {READY_S:.0f} s: {_tail(log)}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; it leads a process group of its own."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        # The next server needs the memory and the cores, so wait for orphans too; they are not ours to reap.
        deadline = time.monotonic() + STOP_S
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.02)
    process.wait()


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]
