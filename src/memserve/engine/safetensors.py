"""Reads safetensors files, a single one or a sharded model's many, without torch.

Format: 8 bytes of little-endian length, a JSON header ``{name: {dtype, shape, data_offsets}}``, the data
(https://github.com/huggingface/safetensors). Files are untrusted input: every offset is checked against the
file's size before it is used.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import attrs

from memserve.engine.gguf import TensorInfo
from memserve.errors import UserError

DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
"""Data types that can be read, with the size of one value in bytes."""

_HEADER_MAX = 100_000_000
"""Largest header in bytes; the format's own limit."""


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the offset of the data.

    Raises ValueError for a file that is not in the safetensors format.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= _HEADER_MAX:
            raise ValueError("its first 8 bytes are not the length of a header")
        header = json.loads(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, 8 + size


@attrs.frozen
class Safetensors:
    """The tensors of one or many files, mapped. Close it once no view of its data is left."""

    tensors: dict[str, TensorInfo]
    _mappings: dict[str, mmap.mmap] = attrs.field(repr=False, eq=False)
    """Mappings by tensor name; tensors of one file share theirs."""

    @classmethod
    def open(cls, paths: Iterable[Path]) -> Safetensors:
        """Map files and read their headers.

        Raises UserError if one is missing, damaged or of another data type.
        """
        tensors: dict[str, TensorInfo] = {}
        mappings: dict[str, mmap.mmap] = {}
        for path in paths:
            try:
                header, base = read_header(path)
                with path.open("rb") as file:
                    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"{path}: cannot be read as a safetensors file: {error}") from error
            for name, entry in header.items():
                if name == "__metadata__":
                    continue
                if name in tensors:
                    raise UserError(f"{path}: tensor {name!r} is in another file, too")
                tensors[name] = _info(path, name, entry, base, len(mapping))
                mappings[name] = mapping
        return cls(tensors, mappings)

    def data(self, tensor: TensorInfo) -> memoryview:
        """The tensor's bytes as stored in the file, not copied."""
        return memoryview(self._mappings[tensor.name])[tensor.offset : tensor.offset + tensor.nbytes]

    def close(self) -> None:
        """Unmap the files; one that still has a view is unmapped when that view goes."""
        for mapping in set(self._mappings.values()):
            with contextlib.suppress(BufferError):
                mapping.close()


def _info(path: Path, name: str, entry: Any, base: int, size: int) -> TensorInfo:
    try:
        kind, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
            raise ValueError("not a natural number")
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: damaged: tensor {name!r} has the header {str(entry)[:80]}") from error
    if kind not in DTYPES:
        raise UserError(
            f"{path}: tensor {name!r} has data type {kind}, which is not supported; supported: {', '.join(DTYPES)}"
        )
    if not start <= end <= size - base or end - start != prod(shape) * DTYPES[kind] or 0 in shape:
        raise UserError(f"{path}: damaged or truncated: tensor {name!r} reaches past the end of the file")
    return TensorInfo(name, shape, kind, base + start, end - start)
