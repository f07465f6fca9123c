"""Compiles the native step into the user's cache.

Does not need torch, so it can run before any worker starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from memserve.engine.tiles import TILE

if TYPE_CHECKING:
    from memserve.engine.spec import ModelSpec

_FOLDER = Path(__file__).with_name("native")
SOURCES = sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cpp", ".hpp"))
_AVX2 = {"avx2": "-mavx2", "fma": "-mfma"}
"""Instructions that the step requires, by the kernel's name, with the compiler's flag."""
_AVX512 = {
    **{name: f"-m{name}" for name in ("avx512f", "avx512bw", "avx512vl", "avx512dq", "fma")},
    "avx512_bf16": "-mavx512bf16",
}
"""Instructions that it uses instead if the processor and the compiler have all of them."""
_AMX = {"amx_tile": "-mamx-tile", "amx_bf16": "-mamx-bf16"}
"""Instructions that it uses in addition if both have them."""
_FLAGS = ("-O3", "-shared", "-fPIC")
_BUILD_S_MAX = 120

HEAD_MAX = 256
"""Largest head_dim; interface.hpp has the same constant."""


def target_flags() -> tuple[str, ...]:
    """Compiler flags that every build of the sources for this processor needs. Raises NativeUnavailable."""
    has = _processor_flags()
    if missing := _AVX2.keys() - has:
        raise NativeUnavailable(f"the processor lacks {', '.join(sorted(missing))}")
    better = (
        one for one in (_AVX512 | _AMX, _AVX512) if has >= one.keys() and _knows(_compiler(), *one.values())
    )
    instructions = next(better, _AVX2)
    # No contraction: whether a product and a sum are rounded once or twice must not depend on inlining.
    return ("-std=c++17", "-pthread", "-ffp-contract=off", *instructions.values())


class NativeUnavailable(Exception):
    """The native step cannot run on this machine or for this model; the text says why."""


def why_not(spec: ModelSpec, dtype: str) -> str | None:
    """Why a model cannot run in ``dtype`` on this machine's native step, as far as known without a build."""
    widths = (spec.hidden, spec.intermediate, spec.head_dim)
    if dtype != "bfloat16":
        return f"it computes in bfloat16, the model in {dtype}"
    if any(width % TILE for width in widths) or spec.head_dim > HEAD_MAX:
        return f"widths {widths} must be multiples of {TILE}, heads at most {HEAD_MAX}"
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler: there is no {_compiler()}"
    try:
        target_flags()
    except NativeUnavailable as reason:
        return str(reason)
    return None


@cache
def _knows(compiler: str, *flags: str) -> bool:
    """Whether a compiler has these flags: it may be older than the processor."""
    command = [compiler, *flags, "-E", "-x", "c++", os.devnull]
    try:
        return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False  # the build will say what is wrong with the compiler


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def built_library(cache_dir: Path) -> Path:
    """The shared library, built if it does not exist: 5 to 10 s, once. Raises NativeUnavailable."""
    flags = (*_FLAGS, *target_flags())
    compiler = _compiler()
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"no C++ compiler: {error}") from error
    sources = b"".join(path.read_bytes() for path in SOURCES)
    key = hashlib.sha256(sources + version + " ".join(flags).encode()).hexdigest()[:16]
    library = cache_dir / "native" / f"step-{key}.so"
    if library.exists():
        return library  # without the lock, which a read-only cache cannot have
    library.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may need it at once: one builds, the others wait.
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, flags, library, lock.fileno())
    return library


def _compile(compiler: str, flags: tuple[str, ...], library: Path, lock: int) -> None:
    """Compile the library. Raises NativeUnavailable.

    The compiler inherits the descriptor of the lock, so the lock is held until the compiler has ended, even
    if this process is killed: two compilers would write to the same file.
    """
    partial = library.with_suffix(".partial")
    command = [compiler, *flags, str(_FOLDER / "step.cpp"), "-o", str(partial)]
    try:
        built = subprocess.run(
            command, capture_output=True, text=True, timeout=_BUILD_S_MAX, check=False, pass_fds=[lock]
        )
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"{compiler} took more than {_BUILD_S_MAX} s") from error
    if built.returncode:
        raise NativeUnavailable(f"{compiler} failed: {built.stderr[-500:]}")
    partial.rename(library)


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())
