"""Runs the PTX of ``make gpu-kernels`` on the CPU: translated (``ptx``) and compiled at first launch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ptx
import ptx_instructions

RUNTIME = Path(__file__).parent / "rehearsal"
COMPILER = ("g++", "-std=c++20", "-O1", "-march=x86-64-v3", "-fwrapv", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{RUNTIME}")  # fmt: skip
PARAMS = 4096
"""Maximum size of a kernel's arguments, in bytes."""
NO_KERNEL = 98
"""cudaErrorInvalidDeviceFunction."""


class Dim(ctypes.Structure):
    """Dimensions of a grid or a block."""

    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


Runner = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(Dim), ctypes.POINTER(Dim), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
)  # fmt: skip


class Kernels:
    """All kernels of the PTX modules under ``modules``; compiled libraries are kept in ``folder``."""

    def __init__(self, modules: Path, folder: Path, device: ctypes.CDLL) -> None:
        """``device``: takes compiled kernels onto its stream, or into the graph that it captures."""
        self._folder, self._launch = folder, device.device_run
        self._launch.restype = None
        self._launch.argtypes = (ctypes.c_void_p, ctypes.c_char_p, Dim, Dim, ctypes.c_size_t, ctypes.c_char_p)
        folder.mkdir(parents=True, exist_ok=True)
        self._modules = {
            name: path
            for path in sorted(modules.glob("*/*.ptx"))
            for name in re.findall(r"^(?:\.visible |\.weak )?\.entry (\w+)\(", path.read_text(), re.MULTILINE)
        }
        self._compiled: dict[str, Any] = {}
        self._one_at_a_time = threading.Lock()
        self.runner = Runner(self._run)
        """C callback for ``run_kernels`` of the runtime."""

    def _run(self, name: bytes, grid: Any, block: Any, shared: int, given: Any) -> int:
        try:
            with self._one_at_a_time:
                kernel, params = self._kernel(name.decode()), ctypes.create_string_buffer(PARAMS)
                kernel.gather(given, params)
                self._launch(kernel.run, name, grid[0], block[0], shared, params)
        except (KeyError, ptx.NotTranslated, subprocess.CalledProcessError) as why:
            print(f"{name.decode()}: {why!r}", file=sys.stderr, flush=True)
            return NO_KERNEL
        return 0

    def _kernel(self, name: str) -> Any:
        found = self._compiled.get(name)
        if found is None:
            found = self._compiled[name] = ctypes.CDLL(str(self._library(name)))
        return found

    def _library(self, name: str) -> Path:
        module = self._modules[name].read_text()
        tools = (Path(ptx.__file__), Path(ptx_instructions.__file__), *sorted(RUNTIME.glob("*.hpp")))
        made_by = (module, name, *(path.read_text() for path in tools), repr(COMPILER))
        key = hashlib.sha256("\0".join(made_by).encode()).hexdigest()[:20]
        library = self._folder / f"{key}.so"
        if not library.exists():
            new = library.with_suffix(f".{os.getpid()}")
            source = ptx.translate(module, name)
            subprocess.run([*COMPILER, "-x", "c++", "-", "-o", str(new)], input=source, text=True, check=True)
            new.replace(library)
        return library
