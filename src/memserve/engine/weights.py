"""Converts a GGUF file once into a safetensors file that every worker of a host maps, and maps it.

The converted form is what the engine wants and nothing else: q|k|v and gate|up concatenated, llama.cpp's q/k
permutation undone, a tied head not stored twice, tensors aligned to cache lines. Matrices have the run's dtype; norm
weights stay float32. It lies in the user's cache, keyed by the content of the model file:

    <cache>/models/<digest>-<dtype>/{weights.safetensors, tokenizer.json, spec.json}
    <cache>/seen/<digest of path, size, mtime>      the content digest of a file seen before

Nothing here imports torch but ``map_weights`` and ``random_weights``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.engine.gguf import Gguf, read_gguf
from memserve.engine.quants import Floats, dequantise, round_to_bfloat16
from memserve.engine.spec import DTYPE_BYTES, ModelSpec, spec_of
from memserve.errors import UserError

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
"""Bytes; a cache line, so that no row of a matrix starts in the middle of one."""

_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float32": "F32"}


@attrs.frozen
class ModelFiles:
    """A model, ready to run."""

    spec: ModelSpec
    weights: Path
    """safetensors, for ``map_weights``."""
    tokenizer: Path
    """tokenizer.json of the ``tokenizers`` library."""


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, matrices as (out, in). The model's whole vocabulary of names."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.vocab, spec.hidden)}
    for layer in range(spec.layers):
        shapes |= {
            f"{layer}.attn_norm": (spec.hidden,),
            f"{layer}.qkv": (q + 2 * kv, spec.hidden),
            f"{layer}.o": (spec.hidden, q),
            f"{layer}.mlp_norm": (spec.hidden,),
            f"{layer}.gate_up": (2 * spec.intermediate, spec.hidden),
            f"{layer}.down": (spec.hidden, spec.intermediate),
        }
    shapes["norm"] = (spec.hidden,)
    if not spec.tied_embeddings:
        shapes["head"] = (spec.vocab, spec.hidden)
    return shapes


def prepare(path: str | Path, dtype: str, cache_dir: Path | None = None) -> ModelFiles:
    """The files of a model, converted on the first call and found in milliseconds afterwards.

    Safe to call from several processes at once: one converts, the others wait. Raises UserError when the file
    cannot be used or the cache cannot be written.
    """
    path, cache = Path(path), cache_dir or default_cache_dir()
    if dtype not in DTYPE_BYTES:
        raise UserError(f"model.dtype: {dtype!r} is not supported; supported: {', '.join(DTYPE_BYTES)}")
    try:
        folder = cache / "models" / f"{_digest(path, cache)}-{dtype}"
        if not _is_complete(folder):
            with _only_one(folder):
                if not _is_complete(folder):
                    _convert(path, dtype, folder)
    except OSError as error:
        raise UserError(
            f"{path}: the converted model cannot be written to {cache}: {error}; "
            "make room there, or name another folder in MEMSERVE_CACHE"
        ) from error
    spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=ModelSpec)
    # The cache is keyed by content; the name is the name of the file that was asked for.
    spec = attrs.evolve(spec, name=path.stem)
    return ModelFiles(spec, folder / "weights.safetensors", folder / "tokenizer.json")


def map_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a converted file, by name: read-only views of one shared mapping.

    All processes that map the file share its page cache, so that a further worker adds no memory for weights.
    Writing to a view is a segmentation fault, which is better than two workers that differ.
    """
    import torch

    header, base = _read_header(path)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    tensors = {}
    with warnings.catch_warnings():
        # torch warns that writes to a read-only buffer are undefined. Nobody writes: the model has no gradients.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        for name, entry in header.items():
            if name.startswith("_"):
                continue
            count, (start, _) = prod(entry["shape"]), entry["data_offsets"]
            flat = torch.frombuffer(mapping, dtype=dtypes[entry["dtype"]], count=count, offset=base + start)
            tensors[name] = flat.view(entry["shape"])
    return tensors


def random_weights(spec: ModelSpec, dtype: str, seed: int) -> dict[str, torch.Tensor]:
    """Weights of the right shapes with no sense in them, for tests."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(spec).items():
        if len(shape) == 1:
            weights[name] = 1 + 0.1 * torch.randn(shape, generator=generator)
        else:
            scale = 1.0 if name == "embed" else shape[1] ** -0.5
            weights[name] = (scale * torch.randn(shape, generator=generator)).to(getattr(torch, dtype))
    return weights


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors in the converted form, for tests and benchmarks of random models."""
    import torch

    names = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
    planned = [
        _Tensor(
            name,
            tuple(tensor.shape),
            names[tensor.dtype],
            lambda tensor=tensor: tensor.contiguous().view(torch.uint8).numpy(),  # type: ignore[misc]
        )
        for name, tensor in tensors.items()
    ]
    _write_safetensors(planned, path)


# ---- the cache ----------------------------------------------------------------------------------------------


def default_cache_dir() -> Path:
    """Where converted models and built kernels are kept: MEMSERVE_CACHE, or memserve in the user's cache folder."""
    if named := os.environ.get("MEMSERVE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memserve"


def _digest(path: Path, cache: Path) -> str:
    """A digest of the file's content, remembered for as long as its path, size and time stay the same."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    seen = cache / "seen" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if seen.is_file() and len(digest := seen.read_text()) == 32:
        return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    seen.parent.mkdir(parents=True, exist_ok=True)
    temporary = seen.with_suffix(f".{os.getpid()}")
    temporary.write_text(digest)
    temporary.rename(seen)
    return digest


def _converter() -> str:
    """A digest of the code that converts, so that a changed converter is never served an old conversion."""
    folder = Path(__file__).parent
    files = (folder / name for name in ("gguf.py", "quants.py", "spec.py", "tokenizer.py", "weights.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _is_complete(folder: Path) -> bool:
    """Whether a conversion is there, whole, and made by this very converter."""
    if not all((folder / name).is_file() for name in ("spec.json", "tokenizer.json", "weights.safetensors")):
        return False
    try:
        header, base = _read_header(folder / "weights.safetensors")
    except (ValueError, KeyError):
        return False
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    whole: bool = (folder / "weights.safetensors").stat().st_size == base + end
    made_by = header.get("__metadata__", {}).get("converter")
    return whole and bool(made_by == _converter())


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The kernel releases it when its holder dies, however it dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert(path: Path, dtype: str, folder: Path) -> None:
    # Only a conversion needs the tokenizer library.
    from memserve.engine.tokenizer import build_tokenizer

    temporary = folder.with_suffix(".partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a converter that was killed: we hold the lock
    temporary.mkdir(mode=0o700)
    with read_gguf(path) as file:
        spec = spec_of(file.metadata, "output.weight" not in file.tensors, str(path))
        _write_safetensors(_plan(file, spec, dtype), temporary / "weights.safetensors")
        build_tokenizer(file.metadata).save(str(temporary / "tokenizer.json"))
    (temporary / "spec.json").write_bytes(msgspec.json.encode(spec))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


# ---- GGUF to safetensors ------------------------------------------------------------------------------------


@attrs.frozen
class _Tensor:
    """One tensor of the converted file; its values are made only when they are written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def _plan(file: Gguf, spec: ModelSpec, dtype: str) -> list[_Tensor]:
    """What to write, after checking that the file holds exactly this model's tensors in the right shapes."""
    expected = _sources(spec)
    parts = {part: None for sources in expected.values() for part in sources}
    if missing := [part for part in parts if part not in file.tensors]:
        raise UserError(f"{file.path}: tensors are missing: {', '.join(missing[:4])}")
    if unknown := [name for name in file.tensors if name not in parts]:
        raise UserError(
            f"{file.path}: {len(unknown)} tensors are not part of a plain Llama model, {unknown[0]!r} for one; "
            "biases and scaled rope are not supported"
        )
    planned = []
    for name, shape in weight_shapes(spec).items():
        rows = sum(file.tensors[part].shape[0] for part in expected[name])
        tails = {file.tensors[part].shape[1:] for part in expected[name]}
        if rows != shape[0] or tails != {shape[1:]}:
            found = [file.tensors[part].shape for part in expected[name]]
            raise UserError(f"{file.path}: {expected[name]} have shapes {found}, expected {shape} together")
        target = dtype if len(shape) > 1 else "float32"
        planned.append(_Tensor(name, shape, target, _maker(file, spec, expected[name], target)))
    return planned


def _sources(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """The GGUF tensors that each weight is concatenated from."""
    sources: dict[str, tuple[str, ...]] = {"embed": ("token_embd.weight",), "norm": ("output_norm.weight",)}
    for layer in range(spec.layers):
        block = f"blk.{layer}."
        sources |= {
            f"{layer}.attn_norm": (block + "attn_norm.weight",),
            f"{layer}.qkv": (block + "attn_q.weight", block + "attn_k.weight", block + "attn_v.weight"),
            f"{layer}.o": (block + "attn_output.weight",),
            f"{layer}.mlp_norm": (block + "ffn_norm.weight",),
            f"{layer}.gate_up": (block + "ffn_gate.weight", block + "ffn_up.weight"),
            f"{layer}.down": (block + "ffn_down.weight",),
        }
    if not spec.tied_embeddings:
        sources["head"] = ("output.weight",)
    return sources


def _maker(file: Gguf, spec: ModelSpec, parts: tuple[str, ...], dtype: str) -> Callable[[], NDArray[Any]]:
    def make() -> NDArray[Any]:
        values = []
        for part in parts:
            floats = dequantise(file, file.tensors[part])
            if part.endswith(("attn_q.weight", "attn_k.weight")):
                floats = _unpermute(floats, spec.head_dim)
            values.append(round_to_bfloat16(floats) if dtype == "bfloat16" else floats)
        return values[0] if len(values) == 1 else np.concatenate(values)

    return make


def _unpermute(weight: Floats, head_dim: int) -> Floats:
    """Undo llama.cpp's reordering of q and k rows, (heads * head_dim, in), which interleaves the two rope halves."""
    out, inner = weight.shape
    pairs = weight.reshape(out // head_dim, head_dim // 2, 2, inner)
    return pairs.swapaxes(1, 2).reshape(out, inner)


def _write_safetensors(tensors: list[_Tensor], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "memserve", "converter": _converter()}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        if offset != end:
            # safetensors allows no holes, so that what aligns the next tensor is a tensor too.
            header[f"_pad.{end}"] = {"dtype": "U8", "shape": (offset - end,), "data_offsets": (end, offset)}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(memoryview(tensor.make()).cast("B"))  # type: ignore[arg-type]
            file.write(b"\0" * (-tensor.nbytes % ALIGNMENT))


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the offset of the data. Raises ValueError when it is not a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= 100_000_000:
            raise ValueError(f"{path}: not a safetensors file")
        header: dict[str, Any] = json.loads(file.read(size))
    return header, 8 + size
