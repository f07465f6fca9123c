"""The native step: ``step.cpp``, built on the machine it runs on, called through ctypes.

Built at the first start, in about 4 s, into the user's cache, keyed by source and compiler; without a compiler or
the instructions, ``open_step`` says so once in the log and the engine runs on torch alone: right, but slower.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_void_p
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from memserve.engine.plans import BatchPlan
from memserve.engine.spec import ModelSpec
from memserve.tokens import count

MAX_ROWS = 512
"""Tokens of a step that its buffers hold; a larger step runs on torch, at about half the rate."""

_SOURCE = Path(__file__).with_name("step.cpp")
_INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "fma")
_FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"),
    *(f"-m{name.replace('_', '')}" for name in _INSTRUCTIONS),
)
_BUILD_S_MAX = 120

log = structlog.get_logger()


class NativeUnavailable(Exception):
    """Why this machine or model cannot have the native step."""


class _Config(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("vocab", "page_tokens", "max_rows", "max_threads")),
        ("rms_eps", c_float),
    ]


_LAYER_FIELDS = ("attn_norm", "qkv", "o", "mlp_norm", "gate_up", "down")


class _Layer(Structure):
    _fields_ = [(name, c_void_p) for name in _LAYER_FIELDS]


class _Batch(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rows", "wanted", "threads")),
        *(
            (name, c_void_p)
            for name in ("ids", "positions", "tables", "table_at", "wanted_at", "arena", "logits")
        ),
    ]


class NativeStep:
    """The model of ``engine/model.py`` in bfloat16. One step at a time; holds its own idle threads."""

    def __init__(
        self,
        library: ctypes.CDLL,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        rope: tuple[torch.Tensor, torch.Tensor],
        page_tokens: int,
        threads: int,
    ) -> None:
        half = spec.head_dim // 2
        self._library, self._vocab, self._threads = library, spec.vocab, threads
        # What the native side points to; it lives as long as this does.
        self._weights = dict(weights)
        self._rope = [table[:, :half].contiguous() for table in rope]
        config = _Config(
            spec.layers, spec.hidden, spec.intermediate, spec.heads, spec.kv_heads, spec.head_dim,
            spec.vocab, page_tokens, MAX_ROWS, threads, spec.rms_eps,
        )  # fmt: skip
        layers = (_Layer * spec.layers)(
            *(
                _Layer(*(self._at(f"{layer}.{name}") for name in _LAYER_FIELDS))
                for layer in range(spec.layers)
            )
        )
        head = "embed" if spec.tied_embeddings else "head"
        tables = [table.data_ptr() for table in self._rope]
        self._engine: int | None = library.ms_open(
            byref(config), layers, self._at("embed"), self._at(head), self._at("norm"), *tables
        )
        if not self._engine:
            raise NativeUnavailable("no memory or no threads")

    def forward(self, plan: BatchPlan, arena: torch.Tensor, threads: int) -> torch.Tensor:
        """As ``Llama.forward``: logits (wanted rows, vocab) float32. ``plan`` is checked and has few tokens."""
        lengths = [count(row.tokens) for row in plan.rows]
        if sum(lengths) > MAX_ROWS:  # its buffers end there
            raise ValueError(f"{sum(lengths)} tokens in a step of at most {MAX_ROWS} tokens")
        starts = np.repeat(
            [row.start - end for row, end in zip(plan.rows, _before(lengths), strict=True)], lengths
        )
        positions = (starts + np.arange(sum(lengths))).astype(np.int32)
        tables = [row.pages for row in plan.rows]
        ends = list(accumulate(lengths))
        logits = torch.empty(sum(row.sample is not None for row in plan.rows), self._vocab)
        arrays: list[NDArray[np.int32]] = [
            np.frombuffer(b"".join(row.tokens for row in plan.rows), np.int32),
            positions,
            np.concatenate(tables).astype(np.int32),
            np.repeat(_before([len(table) for table in tables]), lengths).astype(np.int32),
            np.array(
                [end - 1 for row, end in zip(plan.rows, ends, strict=True) if row.sample is not None],
                np.int32,
            ),
        ]
        batch = _Batch(
            ends[-1],
            len(logits),
            min(threads, self._threads),
            *(array.ctypes.data for array in arrays),
            arena.data_ptr(),
            logits.data_ptr(),
        )
        self._library.ms_step(self._engine, byref(batch))
        return logits

    def close(self) -> None:
        """End its threads."""
        if self._engine:
            self._library.ms_close(self._engine)
            self._engine = None

    def _at(self, name: str) -> int:
        tensor = self._weights[name]
        assert tensor.is_contiguous(), name
        return tensor.data_ptr()


def _before(lengths: Sequence[int]) -> list[int]:
    """The sum of all earlier lengths, for each."""
    return [0, *accumulate(lengths)][: len(lengths)]


def open_step(
    spec: ModelSpec,
    weights: Mapping[str, torch.Tensor],
    rope: tuple[torch.Tensor, torch.Tensor],
    page_tokens: int,
    threads: int,
    cache_dir: Path,
) -> NativeStep | None:
    """The native step for a model, or None, with the reason in the log, where there can be none."""
    try:
        _check_model(spec, weights["embed"].dtype)
        return NativeStep(load(cache_dir), spec, weights, rope, page_tokens, threads)
    except NativeUnavailable as reason:
        log.warning(
            "native step unavailable", reason=str(reason), consequence="decoding runs on torch, slower"
        )
        return None


def _check_model(spec: ModelSpec, dtype: torch.dtype) -> None:
    if dtype != torch.bfloat16:
        raise NativeUnavailable(f"it computes in bfloat16, the model is {dtype}")
    if spec.qkv_bias or spec.qk_norm:
        raise NativeUnavailable(f"the biases or q and k norms of {spec.architecture} are not in it")
    widths = (spec.hidden, spec.intermediate, spec.head_dim)
    if any(width % 32 for width in widths) or spec.head_dim > 256 or spec.vocab % 4:
        raise NativeUnavailable(
            f"widths {widths} must be multiples of 32, heads at most 256, {spec.vocab} of 4"
        )
    if spec.heads // spec.kv_heads > 16:
        raise NativeUnavailable(f"{spec.heads} heads on {spec.kv_heads} kv heads; at most 16 may share one")


@cache
def load(cache_dir: Path) -> ctypes.CDLL:
    """Build the library if it is not there, and load it. Raises NativeUnavailable."""
    missing = set(_INSTRUCTIONS) - _processor_flags()
    if missing:
        raise NativeUnavailable(f"the processor lacks {', '.join(sorted(missing))}")
    try:
        library = ctypes.CDLL(str(_build(cache_dir)))
    except OSError as error:
        raise NativeUnavailable(str(error)) from error
    library.ms_open.restype = c_void_p
    library.ms_open.argtypes = [POINTER(_Config), POINTER(_Layer), *[c_void_p] * 5]
    library.ms_step.restype = library.ms_close.restype = None
    library.ms_step.argtypes = [c_void_p, POINTER(_Batch)]
    library.ms_close.argtypes = [c_void_p]
    return library


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def _build(cache_dir: Path) -> Path:
    compiler = os.environ.get("CXX", "g++")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"no C++ compiler: {error}") from error
    key = hashlib.sha256(_SOURCE.read_bytes() + version + " ".join(_FLAGS).encode()).hexdigest()[:16]
    folder = cache_dir / "native"
    library = folder / f"step-{key}.so"
    folder.mkdir(parents=True, exist_ok=True)
    # Workers start together: one builds, the others wait for it.
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            partial = library.with_suffix(".partial")
            command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(partial)]
            built = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S_MAX, check=False)
            if built.returncode:
                raise NativeUnavailable(f"{compiler} failed: {built.stderr[-500:]}")
            partial.rename(library)
    return library
