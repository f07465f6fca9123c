"""Kernels that ``make gpu-kernels`` kept as PTX, run on the CPU: translated (``ptx``) and compiled when they are first launched."""

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

RUNTIME = Path(__file__).parent / "rehearsal" / "warps.hpp"
COMPILER = ("g++", "-std=c++20", "-O1", "-march=x86-64-v3", "-fwrapv", "-ffp-contract=off", "-w", "-shared", "-fPIC", f"-I{RUNTIME.parent}")  # fmt: skip
NO_KERNEL, FAILED = 98, 719
"""cudaErrorInvalidDeviceFunction and cudaErrorLaunchFailure."""


class _Dim(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


Runner = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_Dim), ctypes.POINTER(_Dim), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)
)  # fmt: skip


class Kernels:
    """All kernels of the modules under ``modules``; compiled ones are kept in ``folder``."""

    def __init__(self, modules: Path, folder: Path, holds: Any) -> None:
        """``holds(address, bytes)``, of C: whether a kernel may touch these bytes."""
        self._folder, self._holds = folder, ctypes.cast(holds, ctypes.c_void_p)
        folder.mkdir(parents=True, exist_ok=True)
        self._modules = {
            name: path
            for path in sorted(modules.glob("*/*.ptx"))
            for name in re.findall(r"^(?:\.visible |\.weak )?\.entry (\w+)\(", path.read_text(), re.MULTILINE)
        }
        self._compiled: dict[str, Any] = {}
        self._one_at_a_time = threading.Lock()
        self.runner = Runner(self._run)
        """For ``run_kernels`` of the runtime."""

    def _run(self, name: bytes, grid: Any, block: Any, shared: int, given: Any) -> int:
        try:
            with self._one_at_a_time:
                wrong = self._kernel(name.decode())(grid[0], block[0], shared, given, self._holds)
        except (KeyError, ptx.NotTranslated, subprocess.CalledProcessError) as why:
            print(f"{name.decode()}: {why!r}", file=sys.stderr, flush=True)
            return NO_KERNEL
        if wrong:
            print(f"{name.decode()}: {wrong.decode()}", file=sys.stderr, flush=True)
        return FAILED if wrong else 0

    def _kernel(self, name: str) -> Any:
        found = self._compiled.get(name)
        if found is None:
            found = ctypes.CDLL(str(self._library(name))).run
            found.restype = ctypes.c_char_p
            found.argtypes = (_Dim, _Dim, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
            self._compiled[name] = found
        return found

    def _library(self, name: str) -> Path:
        module = self._modules[name].read_text()
        made_by = (module, name, Path(ptx.__file__).read_text(), RUNTIME.read_text(), repr(COMPILER))
        key = hashlib.sha256("\0".join(made_by).encode()).hexdigest()[:20]
        library = self._folder / f"{key}.so"
        if not library.exists():
            new = library.with_suffix(f".{os.getpid()}")
            source = new.with_suffix(f".{os.getpid()}.cpp")
            source.write_text(ptx.translate(module, name))
            subprocess.run([*COMPILER, str(source), "-o", str(new)], check=True)
            source.unlink()
            new.replace(library)
        return library
