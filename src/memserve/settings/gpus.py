"""The NVIDIA GPUs of this machine, and whether memserve can use them; needs no CUDA context and no torch.

They are read from ``nvidia-smi``, which comes with every driver. It runs as a process of its own, so that
neither a broken driver nor a context of half a gigabyte stays in the supervisor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import attrs

PREFIX = "cuda:"
QUERY = ("index", "uuid", "name", "memory.free", "compute_cap")
ASK_S = 20.0
"""Longest wait for nvidia-smi; the first call on an idle machine wakes the GPUs, which takes seconds."""
CAPABILITY_MIN = (8, 0)
"""Compute capability that FlashInfer's bfloat16 kernels need (Ampere)."""
CPU_REMEDY = "memserve up -c demo serves on CPUs"


@attrs.frozen
class Gpu:
    """One GPU of this machine."""

    index: int
    """The N of ``cuda:N``, counted in PCI bus order among the GPUs that CUDA_VISIBLE_DEVICES leaves."""
    uuid: str
    name: str
    free_bytes: int
    capability: tuple[int, int]


@attrs.frozen
class Gpus:
    """The GPUs found, and whether they can be used."""

    found: tuple[Gpu, ...] = ()
    problem: str | None = None
    """Why none of them can be used, in a few words; None if they can."""

    def get(self, index: int) -> Gpu | None:
        """The GPU ``cuda:index``."""
        return next((gpu for gpu in self.found if gpu.index == index), None)


def device_index(device: str) -> int | None:
    """The N of ``cuda:N``, or None for ``cpu``."""
    return int(device.removeprefix(PREFIX)) if device.startswith(PREFIX) else None


def gpu_environment() -> dict[str, str]:
    """The environment variables of a process that will use a GPU; they must be set before it starts.

    By default CUDA numbers GPUs by speed, but nvidia-smi numbers them by PCI bus. The other two variables
    keep FlashInfer from using other implementations of its norms, and tvm-ffi from compiling what torch has
    built in.
    """
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "FLASHINFER_USE_CUDA_NORM": "1",
        "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",
    }


def find_gpus() -> Gpus:
    """The GPUs that this process may use, and whether the packages that they need are installed.

    Never raises.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return Gpus(problem="there is no NVIDIA GPU here (no nvidia-smi)")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Gpus(problem=f"nvidia-smi does not answer: {error}")
    if done.returncode:
        said = (done.stdout + done.stderr).strip().partition("\n")[0]
        return Gpus(problem=f"there is no NVIDIA GPU here (nvidia-smi: {said})")
    found = visible(parse(done.stdout), os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not found:
        return Gpus(problem="there is no NVIDIA GPU that this process may use")
    return Gpus(found, missing_packages())


def parse(answer: str) -> tuple[Gpu, ...]:
    """The GPUs in nvidia-smi's answer to ``QUERY``; malformed lines are skipped."""
    gpus = []
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        try:
            index, uuid, name, free, capability = fields
            major, minor = map(int, capability.split("."))
            gpus.append(Gpu(int(index), uuid, name, int(free) << 20, (major, minor)))
        except ValueError:
            continue
    return tuple(gpus)


def visible(gpus: Sequence[Gpu], limit: str | None) -> tuple[Gpu, ...]:
    """The GPUs that ``CUDA_VISIBLE_DEVICES`` leaves, renumbered like CUDA, which stops at an unknown one."""
    if limit is None:
        return tuple(gpus)
    found: list[Gpu] = []
    for name in filter(None, (part.strip() for part in limit.split(","))):
        gpu = next((gpu for gpu in gpus if name in (str(gpu.index), gpu.uuid)), None)
        if gpu is None:
            break
        found.append(attrs.evolve(gpu, index=len(found)))
    return tuple(found)


def missing_packages(modules: Mapping[str, str] | None = None) -> str | None:
    """Which packages for GPUs are not installed, with the remedy; None when all are.

    They are located, never imported. ``modules``: import names and the packages that provide them.
    """
    wanted = modules or {"cupy": "cupy-cuda13x", "flashinfer": "flashinfer-python"}
    missing = [package for module, package in wanted.items() if find_spec(module) is None]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install 'memserve[cuda]'"
    torch = find_spec("torch")
    for folder in (torch and torch.submodule_search_locations) or ():
        if not Path(folder, "lib", "libtorch_cuda.so").exists():
            return "torch was built without CUDA: install a CUDA build of torch"
    return None
