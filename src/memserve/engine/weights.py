"""Converts a model once into a safetensors file that every worker of a host maps, and maps it.

The converted form holds exactly what the engine needs: q|k|v and gate|up concatenated, llama.cpp's
permutation of q and k undone, a tied head not stored twice, tensors aligned to cache lines. Matrices have the
run's dtype, or are int8 with one float32 scale per row; norm weights and biases stay float32. For the native
step, matrices are stored in tiles (see ``tiles.py``). The files are in the user's cache, keyed by the content
of the model's files:

    <cache>/models/<digest>-<type of matrices>[-tiles]/{weights.safetensors, tokenizer.json, spec.json}
    <cache>/seen/<digest of path, size, mtime, inode>      the content digest of a file seen before

Weights are numpy arrays here; numpy has no bfloat16, so that type is held as its bits, in uint16. torch is
imported only by the functions that make or take tensors: the native step needs none.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import attrs
import msgspec
import numpy as np
from numpy.typing import NDArray

from memserve.engine.checkpoint import checkpoint_files, open_checkpoint
from memserve.engine.convert import (
    SCALE,
    Tensor,
    Weight,
    conversion,
    save_tokenizer,
    stored_as,
    weight_shapes,
)
from memserve.engine.quants import quantise_rows
from memserve.engine.safetensors import read_header
from memserve.engine.spec import STORED_BYTES, ModelSpec, name_of
from memserve.engine.tiles import to_rows, to_tiles, whole_strips
from memserve.errors import UserError
from memserve.kernels.mapping import map_shared

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
"""Bytes; one cache line, so that every tensor starts on one."""

CONVERTER = (
    *(
        "checkpoint.py",
        "convert.py",
        "families.py",
        "ggml_blocks.py",
        "gguf.py",
        "gguf_spec.py",
        "gguf_tokenizer.py",
        "hf.py",
        "quants.py",
        "rope_scaling.py",
    ),
    *("safetensors.py", "spec.py", "tiles.py", "tokenizer.py", "weights.py"),
)
"""The source files that a conversion depends on."""

_SAFETENSORS_NAMES = {"bfloat16": "BF16", "float32": "F32", "int8": "I8"}
HELD_AS: Mapping[str, type[np.generic]] = {"bfloat16": np.uint16, "float32": np.float32, "int8": np.int8}
"""How values of each type are held in arrays."""

Bits = Mapping[str, NDArray[Any]]
"""Weights by name: float32, int8, or the bits of bfloat16 as uint16."""


@attrs.frozen
class ModelFiles:
    """The files of a converted model."""

    spec: ModelSpec
    weights: Path
    """The safetensors file, for ``map_weights``."""
    tokenizer: Path
    """The tokenizer.json, for the ``tokenizers`` library."""


def prepare(
    path: str | Path, stored: str, cache_dir: Path | None = None, *, tiled: bool = False
) -> ModelFiles:
    """The files of a model, converted on the first call and found in milliseconds afterwards.

    ``stored``: the type of its matrices, a key of ``STORED_BYTES``; int8 serves a run in either dtype.
    ``tiled``: store matrices in tiles; only for models whose widths the native step supports.

    Safe to call from several processes at once: one converts, the others wait. Raises UserError when the file
    cannot be used or the cache cannot be written.
    """
    path, cache = Path(path), cache_dir or default_cache_dir()
    if stored not in STORED_BYTES:
        raise UserError(f"weights of type {stored!r} are not supported; supported: {', '.join(STORED_BYTES)}")
    try:
        folder = cache / "models" / f"{_digest(path, cache)}-{stored}{'-tiles' if tiled else ''}"
        if not _is_complete(folder):
            with _only_one(folder):
                if not _is_complete(folder):
                    _convert(path, stored, tiled, folder)
    except OSError as error:
        raise UserError(
            f"{path}: the converted model cannot be written to {cache}: {error}; "
            "make room there, or name another folder in MEMSERVE_CACHE"
        ) from error
    spec = msgspec.json.decode((folder / "spec.json").read_bytes(), type=ModelSpec)
    # The cache is keyed by content; the model's name comes from the path that was asked for.
    spec = attrs.evolve(spec, name=name_of(path))
    return ModelFiles(spec, folder / "weights.safetensors", folder / "tokenizer.json")


def content_digest(path: Path, cache_dir: Path | None = None) -> str:
    """A digest of the content of a model's files, wherever they are.

    Immediate for files that were prepared before. Raises UserError.
    """
    return _digest(path, cache_dir or default_cache_dir())


def map_bits(path: Path) -> dict[str, NDArray[Any]]:
    """The weights of a converted file: read-only views of one shared mapping.

    All processes that map the file share its page cache, so an additional worker needs no more memory for
    weights.
    """
    header, base = read_header(path)
    types = {stored: name for name, stored in _SAFETENSORS_NAMES.items()}
    with path.open("rb") as file:
        mapping = map_shared(file.fileno(), os.fstat(file.fileno()).st_size, writable=False)
    mapping.prefer_huge()
    mapping.populate()
    found = {}
    for name, entry in header.items():
        if not name.startswith("_"):
            shape, (start, _) = entry["shape"], entry["data_offsets"]
            flat = np.frombuffer(mapping.view, HELD_AS[types[entry["dtype"]]], prod(shape), base + start)
            found[name] = flat.reshape(shape)
    return found


def map_weights(path: Path) -> dict[str, torch.Tensor]:
    """:func:`map_bits` as tensors.

    Writing to one is a segmentation fault, which is better than two workers whose weights differ.
    """
    return tensors_of(map_bits(path))


def tensors_of(bits: Bits) -> dict[str, torch.Tensor]:
    """Weights as tensors, on the same memory."""
    import torch

    with warnings.catch_warnings():
        # torch warns that writes to a read-only buffer are undefined. There are none: the model has no
        # gradients.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(values) for name, values in bits.items()}
    return {
        name: one.view(torch.bfloat16) if one.dtype == torch.uint16 else one for name, one in tensors.items()
    }


def bits_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
    """Tensors in host memory as weights, on the same memory."""
    import torch

    return {
        name: (one.view(torch.uint16) if one.dtype == torch.bfloat16 else one).numpy()
        for name, one in tensors.items()
    }


def in_tiles(weights: Bits) -> dict[str, NDArray[Any]]:
    """The weights with matrices in tiles and scales in whole strips; arrays in that form are not copied."""
    return {
        name: to_tiles(values)
        if values.ndim == 2
        else whole_strips(values)
        if name.endswith(SCALE)
        else values
        for name, values in weights.items()
    }


def in_rows(weights: Bits, spec: ModelSpec) -> dict[str, NDArray[Any]]:
    """The weights with matrices as rows, as torch needs them; arrays in that form are not copied."""
    shapes = weight_shapes(spec)
    found = dict(weights)
    for name, values in weights.items():
        if values.ndim > 2:
            found[name] = to_rows(values, outputs=shapes[name][0])
        elif name.endswith(SCALE):
            found[name] = values[: shapes[name.removesuffix(SCALE)][0]]
    return found


def random_weights(spec: ModelSpec, stored: str, seed: int) -> dict[str, torch.Tensor]:
    """Random weights of the right shapes, for tests. One seed gives the same model in every type."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(spec).items():
        if len(shape) == 1:
            centre = 0 if name.endswith("_bias") else 1
            weights[name] = centre + 0.1 * torch.randn(shape, generator=generator)
        else:
            scale = 1.0 if name == "embed" else shape[1] ** -0.5
            values = scale * torch.randn(shape, generator=generator)
            if (target := stored_as(name, shape, stored)) == "int8":
                quantised, scales = quantise_rows(values.numpy())
                weights |= {name: torch.from_numpy(quantised), name + SCALE: torch.from_numpy(scales)}
            else:
                weights[name] = values.to(getattr(torch, target))
    return weights


def save_weights(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write tensors in the converted form, for tests and benchmarks of random models."""
    import torch

    names = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.int8: "int8"}
    planned = [
        Weight(
            (Tensor(name, tuple(tensor.shape), names[tensor.dtype]),),
            lambda tensor=tensor: iter([(tensor.contiguous().view(torch.uint8).numpy(),)]),  # type: ignore[misc]
        )
        for name, tensor in tensors.items()
    ]
    _write_safetensors(planned, path)


# ---- the cache ----------------------------------------------------------------------------------------------


def default_cache_dir() -> Path:
    """The folder for converted models and built kernels: MEMSERVE_CACHE, or memserve in the user's cache."""
    if named := os.environ.get("MEMSERVE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memserve"


def _digest(path: Path, cache: Path) -> str:
    """A digest of the model's content: of its one file, or of all files of its directory."""
    if not path.is_dir():
        return _file_digest(path, cache)
    lines = [f"{file.name} {_file_digest(file, cache)}" for file in checkpoint_files(path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _file_digest(path: Path, cache: Path) -> str:
    """A digest of the file's content, cached for as long as its path, size, mtime and inode stay the same."""
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
    with suppress(OSError):  # a read-only cache may hold the conversion all the same
        seen.parent.mkdir(parents=True, exist_ok=True)
        temporary = seen.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.rename(seen)
    return digest


def _converter() -> str:
    """A digest of the converter's code, so that a changed converter never serves an old conversion."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in CONVERTER)).hexdigest()[:16]


def _is_complete(folder: Path) -> bool:
    """Whether a complete conversion exists that this version of the converter made."""
    if not all((folder / name).is_file() for name in ("spec.json", "tokenizer.json", "weights.safetensors")):
        return False
    try:
        header, base = read_header(folder / "weights.safetensors")
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


def _convert(path: Path, stored: str, tiled: bool, folder: Path) -> None:
    temporary = folder.with_suffix(".partial")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a converter that was killed: we hold the lock
    temporary.mkdir(mode=0o700)
    try:
        with open_checkpoint(path) as model:
            _write_safetensors(conversion(model, stored, tiled), temporary / "weights.safetensors")
            save_tokenizer(model, temporary / "tokenizer.json")
            (temporary / "spec.json").write_bytes(msgspec.json.encode(model.spec))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # half a model could keep a full disk full


# ---- the converted file --------------------------------------------------------------------------------------


def _write_safetensors(weights: list[Weight], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "memserve", "converter": _converter()}}
    offset = 0
    offsets = {}
    for tensor in (tensor for weight in weights for tensor in weight.tensors):
        end = offset + tensor.nbytes
        offsets[tensor.name] = offset
        header[tensor.name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        if offset != end:
            # safetensors allows no holes, so the padding before the next tensor is a tensor too.
            header[f"_pad.{end}"] = {"dtype": "U8", "shape": (offset - end,), "data_offsets": (end, offset)}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    base = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights:
            _write_weight(weight, [base + offsets[tensor.name] for tensor in weight.tensors], file)
        file.truncate(base + offset)


def _write_weight(weight: Weight, at: list[int], file: BinaryIO) -> None:
    """Write the values of each tensor from its place on; what lies between tensors reads as zeros."""
    ends = [start + tensor.nbytes for start, tensor in zip(at, weight.tensors, strict=True)]
    for piece in weight.pieces():
        for i, values in enumerate(piece):
            file.seek(at[i])
            file.write(memoryview(values).cast("B"))  # type: ignore[arg-type]
            at[i] += values.nbytes
    assert at == ends, weight.tensors
