"""Run every GPU test and print a table of the results: ``make gpu-check``, on a machine without a network.

Wheels in ``.gpu/wheels`` (``make gpu-wheels``) are installed into a temporary folder. Kernels in
``.gpu/aot.tar.xz`` (``make gpu-kernels``) are unpacked to where FlashInfer looks first. Either may be absent
if its contents are installed. A test that hangs or breaks the GPU's context costs no other test its result.
``--run SCRIPT ...`` runs a script in that environment instead.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from gpu_journal import PLACE, read

ROOT = Path(__file__).parent.parent
LIMIT_S = 420.0
"""Time limit of the tests; then the table is printed with the tests that have ended."""
SILENT_S = 180.0
"""Longest time in which no test begins or ends, imports included."""
STOP_S = 15.0
"""Time for pytest to end after SIGINT."""
ENDED = (0, 1, 5)
"""Exit statuses of pytest when it has run all tests: passed, some failed, none was left."""
TESTS = ("tests/test_gpu.py", "tests/test_backends.py", "tests/test_common_pages.py")
"""Every file with GPU tests."""
CHOSEN = "cuda or test_gpu.py"
"""Selects from ``TESTS`` what runs on a GPU, and the checks that FlashInfer has its stand-in's calls."""


def site() -> dict[str, str]:
    """Unpack wheels and kernels, and return the environment variables for the tests."""
    folder = Path(tempfile.mkdtemp(prefix="memserve-gpu-"))
    if wheels := fitting(sorted((ROOT / ".gpu" / "wheels").glob("*.whl"))):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(folder), *map(str, wheels)], check=True)
    paths = [
        *(str(ROOT / name) for name in ("src", "tests", "bench")),
        str(ROOT),
        str(folder),
        os.environ.get("PYTHONPATH", ""),
    ]
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "HF_HUB_OFFLINE": "1",
    }
    archive = ROOT / ".gpu" / "aot.tar.xz"
    if archive.exists() and (folder / "flashinfer").is_dir():
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "flashinfer" / "data" / "aot", filter="data")
        # FlashInfer writes generated sources there even if it compiles nothing; a home may be read-only.
        found.setdefault("FLASHINFER_WORKSPACE_BASE", str(folder))
    return found


def fitting(wheels: list[Path]) -> list[Path]:
    """The wheels if this Python can install all of them, otherwise none: a part of them is of no use."""
    ours = set(sys_tags())
    foreign = [wheel.name for wheel in wheels if not parse_wheel_filename(wheel.name)[3] & ours]
    if foreign:
        print(f".gpu/wheels is for another Python ({foreign[0]}); what is installed here is used")
    return [] if foreign else wheels


def run_tests(journal: Path, environment: dict[str, str], *more: str) -> bool:
    """Run the tests for at most ``LIMIT_S``; return whether all have been run.

    A test in which the process ends, or is silent for ``SILENT_S``, costs itself only: a new process runs the rest.
    """
    begun, until = -1, time.monotonic() + LIMIT_S
    while len(read(journal)) > begun and time.monotonic() < until:
        begun = len(read(journal))
        if _run_once(journal, environment, until, *more) in ENDED:
            return True
    return False


def _run_once(journal: Path, environment: dict[str, str], until: float, *more: str) -> int | None:
    """Run the tests that have not begun yet; pytest's exit status, or None if it had to be stopped."""
    command = [sys.executable, "-m", "pytest", "-v", *TESTS, "-k", CHOSEN, "-W", "default", *more]
    process = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", "-p", "gpu_journal"],
        cwd=ROOT,
        env={**environment, PLACE: str(journal)},
        # A shell's background jobs ignore SIGINT and pytest would inherit that; SIGINT is how it is stopped.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    heard, size = time.monotonic(), -1
    try:
        while (now := time.monotonic()) < min(until, heard + SILENT_S):
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.5)
            if journal.exists() and journal.stat().st_size != size:
                heard, size = now, journal.stat().st_size
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        return None
    finally:
        process.kill()
        process.wait()


def table(journal: Path) -> list[str]:
    """The journal as lines of a Markdown table; tests that did not pass have the last line of the reason."""
    found = read(journal)
    if not found:
        return ["no test was begun"]
    lines = ["| test | result | s | why |", "|---|---|---|---|"]
    for test, entry in found.items():
        result, seconds = entry.get("result", "never ended"), float(str(entry["seconds"]))
        why = str(entry.get("why", "its process was stopped or ended")).replace("|", "/")[:120]
        lines.append(f"| {test.partition('::')[2]} | {result} | {seconds:.1f} | {why} |")
    return lines


def report(journal: Path) -> str:
    """The table, and of each test that failed all that pytest said."""
    texts = {test: entry for test, entry in read(journal).items() if entry.get("result") == "failed"}
    return "\n".join([*table(journal), *(f"\n## {test}\n\n{one['text']}" for test, one in texts.items())])


def main() -> int:
    """Run the tests and print the table, which goes to ``$OUT`` too, if that is set, with what failing tests said.

    The exit status is 1 if a test failed or was not run, 2 without a GPU.
    """
    if shutil.which("nvidia-smi") is None:
        print("gpu-check needs an NVIDIA GPU: there is no nvidia-smi here; make check runs what needs none")
        return 2
    environment = site()
    if sys.argv[1:2] == ["--run"]:
        return subprocess.run(
            [sys.executable, *sys.argv[2:]], cwd=ROOT, env=environment, check=False
        ).returncode
    subprocess.run(
        ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv"], check=False
    )
    journal, began = Path(tempfile.mkdtemp()) / "journal", time.perf_counter()
    whole = run_tests(journal, environment, *sys.argv[1:])
    if out := os.environ.get("OUT"):
        Path(out, "gpu-check.md").write_text(report(journal) + "\n")
    print("\n" + "\n".join(table(journal)))
    print(f"\n{time.perf_counter() - began:.0f} s in all" + ("" if whole else ", then stopped"))
    results = {entry.get("result") for entry in read(journal).values()}
    return 0 if whole and results <= {"passed", "skipped"} else 1


if __name__ == "__main__":
    sys.exit(main())
