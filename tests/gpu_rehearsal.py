"""FlashInfer itself without a GPU: its Python, its compiled host code, and its kernels, which the CPU runs from their PTX.

Three parts stand in for the machine. A torch device of its own (``rehearsal/device.cpp``) refuses, as a GPU does, to mix its
tensors with the host's and to wait within a capture. A CUDA runtime (``rehearsal/cudart.c``) has an H100's limits and
notes each launch. And the kernel that is launched is run (``ptx_kernels``), a thread after another, on the device's memory.

Nothing runs before the host waits for it (``rehearsal/stream.hpp``): a host that reads what the device has yet to write, or writes what
it has yet to read, gets other tokens.
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
"""Of an H100."""
CAPABILITY = (9, 0)


def missing() -> str | None:
    """Why nothing can be rehearsed here."""
    if find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    there = any(COMPILED.glob("*/*.so")) and any(PTX.glob("*/*.ptx"))
    return None if there else "make gpu-kernels has compiled nothing"


def needs_compiled(spec: ModelSpec, backend: str) -> None:
    """Skip where ``make gpu-kernels`` was told to leave out what this model needs."""
    there = {path.stem for path in COMPILED.glob("*/*.so")}
    if left_out := libraries(spec, backend) - there:
        pytest.skip(f"not compiled: {', '.join(sorted(left_out))}")


@attrs.frozen
class Launch:
    """A kernel as it was launched."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    """Bytes of dynamic shared memory."""


class Machine:
    """The device and the runtime, built and loaded once a process."""

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
        # FlashInfer's libraries name it as what they need, and find it loaded.
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
        """What was launched since the last call."""
        lines = self._runtime.noted_launches().decode().splitlines()
        self._runtime.forget_launches()
        return [_launch(line) for line in lines]

    @contextmanager
    def only_noting(self) -> Iterator[None]:
        """No kernel runs: what is launched for a large model would take hours."""
        self._runtime.run_kernels(Runner())
        try:
            yield
        finally:
            self._runtime.run_kernels(self._kernels.runner)

    def peak(self) -> int:
        """Bytes that were allocated at most at a time since the last call."""
        peak: int = self._device.device_peak()
        return peak

    def mark(self) -> int:
        """How many operations, copies and kernels have been launched."""
        launched: int = self._device.device_mark()
        return launched

    def waits(self) -> int:
        """How often the host had to wait since the last call."""
        waits: int = self._device.device_waits()
        return waits

    def wait(self, mark: int) -> None:
        """Until the first ``mark`` of all that was launched are done. Raises RuntimeError for one that failed."""
        if wrong := self._device.device_wait(mark):
            raise RuntimeError(f"on the device: {wrong.decode()}")

    def capture(self, run: Callable[[], None]) -> Graph:
        """What ``run`` does on the device, to be done again. While it is captured nothing may wait or copy to or from the host."""
        self._device.device_begin_capture()
        try:
            run()
        finally:
            graph = Graph(self._device, self._device.device_end_capture())
        return graph


class Graph:
    """A captured step: the operations and kernels of a run, with the tensors, numbers and addresses that they had in it."""

    def __init__(self, device: ctypes.CDLL, held: int) -> None:
        self._device, self._held = device, held

    def __del__(self) -> None:
        self._device.device_drop(self._held)

    def replay(self) -> None:
        """Launch it all again; none of the host's code runs."""
        self._device.device_replay(self._held)


def _compiled(folder: Path, source: str, compiler: str, *more: str) -> Path:
    """A library of a source, compiled once. Processes that start together may both compile it; neither sees half of it."""
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
"""DLPack's number of CUDA devices."""
_TYPES = {
    torch.bfloat16: (4, 16), torch.float32: (2, 32), torch.int32: (0, 32), torch.uint8: (1, 8), torch.int64: (0, 64),
}  # fmt: skip
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = (
    ctypes.py_object,
    (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
)


class _OnCuda:
    """A tensor of the device, said to be a GPU's; its own address, shape and strides."""

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
    """One of FlashInfer's compiled libraries, given the device's tensors as a GPU's."""

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
    """FlashInfer, which takes the device for an H100. Its libraries are those that ``make gpu-kernels`` compiled; it compiles none."""
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
"""Names of the libraries that were called. Loaded is each once a process."""


class _FlashInfer:
    """FlashInfer, imported when something of it is first used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(flashinfer(), name)


Rehearsed: Any = _FlashInfer()
"""A :class:`~memserve.kernels.flashinfer_kit.Library`."""


# ---- captured steps, and the whole of a worker ---------------------------------------------------------------------


class Graphs:
    """CUDA graphs of the machine, and events."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """See the protocol."""
        run()
        self.mark()()
        return machine().capture(run).replay

    def mark(self) -> Callable[[], None]:
        """See the protocol."""
        return functools.partial(machine().wait, machine().mark())


def take_over(engine: Any) -> None:
    """Let ``memserve.engine.cuda`` of this process run on the device, with FlashInfer."""
    from memserve.kernels import flashinfer_kit

    machine()

    def from_dlpack(found: Any) -> torch.Tensor:
        tensor: torch.Tensor = torch.ops.rehearsal.bytes_at(found.ctypes.data, len(found))
        return tensor

    engine.from_dlpack = from_dlpack
    engine.CudaGraphs = lambda device: Graphs()
    engine.load_flashinfer = lambda capability, spec: Rehearsed
    flashinfer_kit._processors = lambda device: PROCESSORS
