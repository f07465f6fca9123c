"""Every GPU test, and one table of what passed: ``make gpu-check``, on a machine without a network.

Wheels in ``.gpu/wheels`` (``make gpu-wheels``) are installed into a folder of their own, kernels in ``.gpu/aot.tar.xz``
(``make gpu-kernels``) put where FlashInfer looks first; either may be absent where what it holds is installed. ``--run SCRIPT ...`` runs a script in that environment instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT_S = 440


def site() -> dict[str, str]:
    """The environment for the tests, with wheels and kernels unpacked."""
    folder = Path(tempfile.mkdtemp(prefix="memserve-gpu-"))
    wheels = sorted(map(str, (ROOT / ".gpu" / "wheels").glob("*.whl")))
    if wheels:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", str(folder), *wheels], check=True)
    archive = ROOT / ".gpu" / "aot.tar.xz"
    if archive.exists() and (folder / "flashinfer").is_dir():
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "flashinfer" / "data" / "aot", filter="data")
    paths = [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }


def main() -> int:
    """Run the tests and print the table; the exit status is pytest's."""
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
    report = Path(tempfile.mkdtemp()) / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py", "-W", "default"]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, f"--junitxml={report}"], cwd=ROOT, env=environment, timeout=LIMIT_S, check=False
    )
    print("\n| test | result | s |\n|---|---|---|")
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        print(
            f"| {case.get('name')} | {wrong[0] if wrong else 'passed'} | {float(case.get('time') or 0):.1f} |"
        )
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
