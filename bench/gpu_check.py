"""Run every GPU test and print a table of the results: ``make gpu-check``, on a machine without a network.

Wheels in ``.gpu/wheels`` (``make gpu-wheels``) are installed into a temporary folder. Kernels in
``.gpu/aot.tar.xz`` (``make gpu-kernels``) are unpacked to where FlashInfer looks first. Either may be absent
if its contents are installed. ``--run SCRIPT ...`` runs a script in that environment instead.
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
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path

from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).parent.parent
LIMIT_S = 420
"""Time limit of the tests; then the table is printed with the tests that have ended."""
STOP_S = 15
"""Time for pytest to write its report after SIGINT."""
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


def run_tests(report: Path, environment: dict[str, str], *more: str) -> int | None:
    """Run pytest for at most ``LIMIT_S``; return its exit status, or None if it had to be stopped."""
    command = [sys.executable, "-m", "pytest", "-q", *TESTS, "-k", CHOSEN, "-W", "default", *more]
    process = subprocess.Popen(
        [*command, "-p", "no:cacheprovider", f"--junitxml={report}"],
        cwd=ROOT,
        env=environment,
        # A shell's background jobs ignore SIGINT and pytest would inherit that; SIGINT is how it is stopped.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        return process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return None


def table(report: Path) -> list[str]:
    """The report as lines of a Markdown table; tests that did not pass have the first line of the reason."""
    if not report.exists():
        return ["no report: pytest was killed, or never began"]
    lines = ["| test | result | s | why |", "|---|---|---|---|"]
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        result, why = ("passed", "") if wrong is None else (wrong.tag, wrong.get("message") or "")
        why = why.partition("\n")[0].replace("|", "/")[:120]
        lines.append(f"| {case.get('name')} | {result} | {float(case.get('time') or 0):.1f} | {why} |")
    return lines


def main() -> int:
    """Run the tests and print the table. The exit status is pytest's, 1 if stopped, or 2 without a GPU."""
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
    report, began = Path(tempfile.mkdtemp()) / "report.xml", time.perf_counter()
    status = run_tests(report, environment, *sys.argv[1:])
    print("\n" + "\n".join(table(report)))
    print(f"\n{time.perf_counter() - began:.0f} s in all" + ("" if status is not None else ", then stopped"))
    return 1 if status is None else status


if __name__ == "__main__":
    sys.exit(main())
