"""Reads GGUF files: metadata and tensors, little endian, versions 2 and 3.

This is a reader of our own, because the ``gguf`` package takes seconds for a header of 50,000 tokens. The
format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Files are untrusted input: every length is
checked against the file's size before it is used, and every defect is a UserError that names the file.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Callable
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

from memserve.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)

GGML_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4",
}  # fmt: skip
"""Names of ggml's tensor types, for error texts; ggml has more."""

BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
"""Tensor types that can be read, with the values and the bytes of one block."""

_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4


@attrs.frozen
class TensorInfo:
    """The location of one tensor in its file."""

    name: str
    shape: tuple[int, ...]
    """Dimensions, outermost first, as in numpy (GGUF stores them reversed)."""
    type: str
    """Tensor type, a key of ``BLOCKS``."""
    offset: int
    """Offset in bytes from the start of the file."""
    nbytes: int


@attrs.frozen
class Gguf:
    """An open GGUF file, used as a context manager.

    Leaving it unmaps the file, and no view of its data may be left by then.
    """

    metadata: dict[str, Any]
    """Metadata by key: scalars, strings, and lists of either."""
    tensors: dict[str, TensorInfo]
    path: Path
    mapping: mmap.mmap = attrs.field(repr=False, eq=False)

    def data(self, tensor: TensorInfo) -> memoryview:
        """The tensor's bytes as stored in the file, not copied."""
        return memoryview(self.mapping)[tensor.offset : tensor.offset + tensor.nbytes]

    def __enter__(self) -> Gguf:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # On an error, the traceback may still hold views of the mapping; it is unmapped with them then.
        if error is None:
            self.mapping.close()


def read_gguf(path: str | Path) -> Gguf:
    """Map a file and read its header. Raises UserError if it is missing, damaged or not supported."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a GGUF file: {error}") from error
    try:
        metadata, tensors = _Header(mapping, str(path)).read()
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        mapping.close()
        raise UserError(f"{path}: damaged or truncated GGUF header: {error}") from error
    except UserError:
        mapping.close()
        raise
    return Gguf(metadata, tensors, path, mapping)


@attrs.define
class _Header:
    """A cursor over the header."""

    _buffer: mmap.mmap
    _source: str
    _at: int = 0

    def read(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if self._buffer[:4] != MAGIC:
            raise self._wrong(f"does not start with {MAGIC.decode()}: it is not a GGUF file")
        self._at = 4
        version, tensor_count, key_count = self._take("I"), self._take("Q"), self._take("Q")
        if version not in VERSIONS:
            raise self._wrong(f"GGUF version {version:#x} is not supported; supported: little-endian 2 and 3")
        self._check_count("metadata keys", key_count, 13)  # a key's length, a type and one byte of value
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            metadata[key] = self._value(self._take("I"))
        self._check_count("tensors", tensor_count, 24)
        infos = [self._tensor() for _ in range(tensor_count)]
        return metadata, self._place(infos, metadata)

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self._source}: {what}")

    def _take(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._buffer, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _check_count(self, what: str, count: int, bytes_each: int) -> None:
        # Before any loop or allocation of that size: a damaged count must not cost minutes or all memory.
        if count * bytes_each > len(self._buffer) - self._at:
            raise self._wrong(
                f"damaged or truncated: {count} {what} do not fit in the file's {len(self._buffer)} bytes"
            )

    def _string(self) -> str:
        length = self._take("Q")
        self._check_count("bytes of text", length, 1)
        start = self._at
        self._at = start + length
        return self._buffer[start : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if (code := _SCALARS.get(kind)) is None:
            raise self._wrong(f"damaged: unknown metadata type {kind} at byte {self._at}")
        return self._take(code)

    def _array(self) -> list[Any]:
        kind, count = self._take("I"), self._take("Q")
        if kind == _STRING:
            self._check_count("strings", count, 8)
            return self._strings(count)
        if (code := _SCALARS.get(kind)) is None:
            raise self._wrong(f"arrays of metadata type {kind} are not supported (at byte {self._at})")
        size = struct.calcsize("<" + code)
        self._check_count("array values", count, size)
        end = self._at + count * size
        values = array("B" if code == "?" else code, self._buffer[self._at : end]).tolist()
        self._at = end
        return [bool(value) for value in values] if code == "?" else values

    def _strings(self, count: int) -> list[str]:
        # The hot loop of every start: 100,000 vocabulary entries and merges. Hence local names and no checks
        # inside; a length past the end makes the next unpack fail, or the last slice short.
        buffer, at, unpack = self._buffer, self._at, struct.Struct("<Q").unpack_from
        strings: list[str] = []
        append: Callable[[str], None] = strings.append
        for _ in range(count):
            (length,) = unpack(buffer, at)
            at += 8 + length
            append(buffer[at - length : at].decode("utf-8"))
        if at > len(buffer):
            raise self._wrong("damaged or truncated: a string reaches past the end of the file")
        self._at = at
        return strings

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int]:
        name, dimensions = self._string(), self._take("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._wrong(f"tensor {name!r} has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
        shape = tuple(self._take("Q") for _ in range(dimensions))[::-1]
        kind, offset = self._take("I"), self._take("Q")
        type_name = GGML_NAMES.get(kind, f"number {kind}")
        if type_name not in BLOCKS:
            raise self._wrong(
                f"tensor {name!r} has type {type_name}, which is not supported; supported: {', '.join(BLOCKS)}"
            )
        return name, shape, type_name, offset

    def _place(
        self, infos: list[tuple[str, tuple[int, ...], str, int]], metadata: dict[str, Any]
    ) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment must be a power of two, got {alignment!r}")
        base = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_name, offset in infos:
            values, size = BLOCKS[type_name]
            if shape[-1] % values or 0 in shape:
                raise self._wrong(
                    f"tensor {name!r}: shape {shape} is not whole blocks of {values} {type_name} values"
                )
            nbytes = prod(shape) // values * size
            if base + offset + nbytes > len(self._buffer):
                raise self._wrong(f"damaged or truncated: tensor {name!r} reaches past the end of the file")
            if name in tensors:
                raise self._wrong(f"damaged: tensor {name!r} appears twice")
            tensors[name] = TensorInfo(name, shape, type_name, base + offset, nbytes)
        return tensors
