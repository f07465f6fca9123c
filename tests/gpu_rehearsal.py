"""The real FlashInfer without a GPU: its Python, its compiled host code, and its kernels' PTX run on the CPU.

Three parts stand in for the machine:

- A torch device (``rehearsal/device.cpp``) that, like a GPU, refuses to mix its tensors with the host's and
  to wait within a capture.
- A CUDA runtime (``rehearsal/cudart.c``) with an H100's limits, which records each launch.
- A runner (``ptx_kernels``) that executes each launched kernel on the device's memory, one thread after
  another.

Nothing runs until the host waits for it (``rehearsal/stream.hpp``). A host that reads memory before the
device has written it, or overwrites memory that the device has yet to read, therefore gets different tokens.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest
import torch

from memserve.engine.spec import ModelSpec
from memserve.kernels.flashinfer_kit import libraries
from ptx_kernels import Kernels, Runner

ROOT = Path(__file__).parent.parent
COMPILED, PTX = ROOT / ".gpu" / "aot", ROOT / ".gpu" / "ptx"
SOURCES = Path(__file__).parent / "rehearsal"
NAME = "rehearsed"
PROCESSORS = 132
"""Streaming multiprocessors of an H100."""
CAPABILITY = (9, 0)


def missing() -> str | None:
    """Why nothing can be rehearsed here; None if it can."""
    if find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    there = any(COMPILED.glob("*/*.so")) and any(PTX.glob("*/*.ptx"))
    return None if there else "make gpu-kernels has compiled nothing"


def needs_compiled(spec: ModelSpec, backend: str) -> None:
    """Skip the test if ``make gpu-kernels`` did not compile the libraries that this model needs."""
    there = {path.stem for path in COMPILED.glob("*/*.so")}
    if left_out := libraries(spec, backend) - there:
        pytest.skip(f"not compiled: {', '.join(sorted(left_out))}")


@attrs.frozen
class Launch:
    """One launch of a kernel."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    """Bytes of dynamic shared memory."""


class Machine:
    """The device and the runtime, built and loaded once per process."""

    def __init__(self, folder: Path) -> None:
        script = folder / "cudart.map"
        script.write_text("libcudart.so.13 { global: *; };")
        torch_at = Path(torch.__file__).parent
        runtime = _compiled(
            folder, "cudart.c", "gcc", "-Wl,-soname,libcudart.so.13", f"-Wl,--version-script={script}"
        )
        device = _compiled(
            folder, "device.cpp", "g++", "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-I{torch_at / 'include'}", f"-L{torch_at / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10",
        )  # fmt: skip
        # FlashInfer's libraries depend on it by its soname and find it already loaded.
        self._runtime = ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        self._runtime.noted_launches.restype = ctypes.c_char_p
        self._device = ctypes.CDLL(str(device))
        self._device.device_peak.restype = ctypes.c_size_t
        self._device.device_mark.restype = ctypes.c_size_t
        self._device.device_waits.restype = ctypes.c_size_t
        self._device.device_wait.argtypes = (ctypes.c_size_t,)
        self._device.device_wait.restype = ctypes.c_char_p
        self._device.device_end_capture.restype = ctypes.c_void_p
        self._device.device_drop.argtypes = self._device.device_replay.argtypes = (ctypes.c_void_p,)
        self._kernels = Kernels(PTX, folder / "kernels", self._device)
        self._runtime.run_kernels.argtypes = (Runner,)
        self._runtime.run_kernels(self._kernels.runner)
        self._runtime.copy_with(self._device.device_copy)
        torch.utils.rename_privateuse1_backend(NAME)
        self._device.device_register()
        torch._register_device_module(NAME, _device_module())
        self.device = torch.device(NAME, 0)

    def launches(self) -> list[Launch]:
        """Kernels launched since the last call."""
        lines = self._runtime.noted_launches().decode().splitlines()
        self._runtime.forget_launches()
        return [_launch(line) for line in lines]

    @contextmanager
    def only_noting(self) -> Iterator[None]:
        """Record launches without running the kernels, which would take hours for a large model."""
        self._runtime.run_kernels(Runner())
        try:
            yield
        finally:
            self._runtime.run_kernels(self._kernels.runner)

    def peak(self) -> int:
        """Peak of the allocated bytes since the last call."""
        peak: int = self._device.device_peak()
        return peak

    def mark(self) -> int:
        """Number of operations, copies and kernels launched so far."""
        launched: int = self._device.device_mark()
        return launched

    def waits(self) -> int:
        """Number of times the host had to wait since the last call."""
        waits: int = self._device.device_waits()
        return waits

    def wait(self, mark: int) -> None:
        """Wait until the first ``mark`` launches are done. Raises RuntimeError if one of them failed."""
        if wrong := self._device.device_wait(mark):
            raise RuntimeError(f"on the device: {wrong.decode()}")

    def capture(self, run: Callable[[], None]) -> Graph:
        """Capture the device work of ``run``, which may not wait, nor copy to or from the host."""
        self._device.device_begin_capture()
        try:
            run()
        finally:
            graph = Graph(self._device, self._device.device_end_capture())
        return graph


class Graph:
    """A captured step: the operations and kernels of one run, with its tensors, numbers and addresses."""

    def __init__(self, device: ctypes.CDLL, held: int) -> None:
        self._device, self._held = device, held

    def __del__(self) -> None:
        self._device.device_drop(self._held)

    def replay(self) -> None:
        """Launch the captured work again; none of the host's code runs."""
        self._device.device_replay(self._held)


def _compiled(folder: Path, source: str, compiler: str, *more: str) -> Path:
    """The library of a source file, compiled once.

    Processes that start together may both compile it; neither sees half a file.
    """
    parts = (SOURCES / source, SOURCES / "stream.hpp")
    given = b"".join(part.read_bytes() for part in parts) + repr((torch.__version__, more)).encode()
    library = folder / f"{Path(source).stem}-{hashlib.sha256(given).hexdigest()[:16]}.so"
    if not library.exists():
        new = library.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-O1", str(SOURCES / source), "-o", str(new), *more], check=True
        )
        new.replace(library)
    return library


def _launch(line: str) -> Launch:
    kernel, grid, block, shared = line.split("\t")
    return Launch(kernel, tuple(map(int, grid.split())), tuple(map(int, block.split())), int(shared))


def _device_module() -> ModuleType:
    module = ModuleType(f"torch.{NAME}")
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False, "get_rng_state_all": [],
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(module, name, functools.partial(lambda value: value, answer))
    return module


# ---- tensors as FlashInfer's libraries would see them on a GPU --------------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


CUDA_DEVICE = 2
"""DLPack's device type for CUDA."""
_TYPES = {
    torch.bfloat16: (4, 16), torch.float32: (2, 32), torch.int32: (0, 32), torch.uint8: (1, 8), torch.int64: (0, 64),
}  # fmt: skip
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
)


class _OnCuda:
    """A tensor of the device, presented as a GPU tensor with the same address, shape and strides."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        sizes = ctypes.c_int64 * max(1, tensor.dim())
        self._shape, self._strides = sizes(*tensor.shape), sizes(*tensor.stride())
        code, bits = _TYPES[tensor.dtype]
        self._managed = _DLManagedTensor(
            _DLTensor(
                tensor.data_ptr(), CUDA_DEVICE, 0, tensor.dim(), code, bits, 1, self._shape, self._strides, 0
            )
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA_DEVICE, 0

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)


class _Library:
    """One of FlashInfer's compiled libraries, which receives the device's tensors as GPU tensors."""

    def __init__(self, name: str, library: Any) -> None:
        self._name, self._library = name, library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import tvm_ffi

        function = getattr(self._library, name)

        def call(*given: Any) -> Any:
            asked.add(self._name)
            shown = [_OnCuda(one) if _of_device(one) else one for one in given]
            return function(*[tvm_ffi.from_dlpack(one) if isinstance(one, _OnCuda) else one for one in shown])

        return call


def _of_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


@functools.cache
def machine() -> Machine:
    """The machine, in a folder that git ignores."""
    folder = ROOT / ".gpu" / "rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    return Machine(folder)


@functools.cache
def flashinfer() -> Any:
    """FlashInfer, made to take the device for an H100.

    It uses only the libraries that ``make gpu-kernels`` compiled and compiles none itself.
    """
    from memserve.settings.gpus import gpu_environment

    os.environ.update(gpu_environment(), FLASHINFER_CUDA_ARCH_LIST="9.0a", FLASHINFER_DISABLE_JIT="1")
    import flashinfer as library
    import flashinfer.utils as utils
    from flashinfer.jit import core, env

    env.FLASHINFER_AOT_DIR = COMPILED
    for kind in (core.JitSpec, *core.JitSpec.__subclasses__()):
        if "load" in vars(kind):
            kind.load = _shown_a_gpu(kind.load)
    answers = {"get_compute_capability": CAPABILITY, "device_support_pdl": True}
    for name, answer in answers.items():
        replaced = getattr(utils, name)
        for module in [one for key, one in sys.modules.items() if key.startswith("flashinfer")]:
            if getattr(module, name, None) is replaced:
                setattr(module, name, functools.partial(lambda value, device: value, answer))
    return library


def _shown_a_gpu(load: Callable[[Any, Path], Any]) -> Callable[[Any, Path], _Library]:
    return lambda spec, path: _Library(spec.name, load(spec, path))


asked: set[str] = set()
"""Names of the libraries that were called; each library is loaded once per process."""


class _FlashInfer:
    """FlashInfer, imported at its first use."""

    def __getattr__(self, name: str) -> Any:
        return getattr(flashinfer(), name)


Rehearsed: Any = _FlashInfer()
"""A :class:`~memserve.kernels.flashinfer_kit.Library`."""


# ---- captured steps, and the whole of a worker ---------------------------------------------------------------------


@attrs.frozen
class Mark:
    """Stands for a CUDA event."""

    launched: int

    def wait(self) -> None:
        """See the protocol."""
        with torch.inference_mode():  # in which the engine launched what is computed now
            machine().wait(self.launched)

    def reached(self) -> bool:
        """Wait, as nothing runs on this device before somebody waits for it."""
        self.wait()
        return True


class Graphs:
    """Stands for CUDA graphs and events, on the machine."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """See the protocol."""
        run()
        self.mark().wait()
        return machine().capture(run).replay

    def mark(self) -> Mark:
        """See the protocol."""
        return Mark(machine().mark())


def take_over(engine: Any) -> None:
    """Make this process's ``memserve.engine.cuda`` (``engine``) run on the device with FlashInfer."""
    from memserve.kernels import flashinfer_kit

    machine()

    def from_dlpack(found: Any) -> torch.Tensor:
        tensor: torch.Tensor = torch.ops.rehearsal.bytes_at(found.ctypes.data, len(found))
        return tensor

    engine.from_dlpack = from_dlpack
    engine.CudaGraphs = lambda device: Graphs()
    engine.load_flashinfer = lambda capability, spec: Rehearsed
    flashinfer_kit._processors = lambda device: PROCESSORS
