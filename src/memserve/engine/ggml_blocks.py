"""Converts ggml's tensor types to float32, vectorised.

Quantised values are stored in blocks of 32 or 256, whose layouts are those of ggml-common.h, by the same
names. A value is ``scale * q``, or ``scale * q + minimum``; q has 2 to 8 bits. In blocks of 256 (the K
types and IQ4_XS), scales and minima are themselves quantised: one of each for 16 or 32 values.

One core converts 70 million (IQ4_XS) to 270 million (Q8_0) values a second; Q4_K as fast as Q4_0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memserve.engine.gguf import BLOCKS, TensorInfo

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

_PIECE = 1 << 16
"""Number of values converted at a time: the temporaries stay in the processor's cache."""

_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
"""What the sixteen codes of IQ4_NL and IQ4_XS stand for."""


def dequantise(data: memoryview, tensor: TensorInfo) -> Floats:
    """A tensor's bytes as float32 in ``tensor.shape``: always a copy, never a view of the file."""
    values, size = BLOCKS[tensor.type]
    blocks = np.frombuffer(data, np.uint8).reshape(-1, size)
    found = np.empty((len(blocks), values), np.float32)
    read, step = _READERS[tensor.type], _PIECE // values
    for start in range(0, len(blocks), step):
        read(blocks[start : start + step], found[start : start + step])
    return found.reshape(tensor.shape)


# ---- parts of blocks -----------------------------------------------------------------------------------------


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of every block: (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _fields(packed: Bytes, bits: int, width: int) -> Bytes:
    """Values of ``bits`` bits from (blocks, bytes): (blocks, bytes * 8 / bits).

    Of every ``width`` bytes, the lowest bits of all come first, then the next ones.
    """
    groups = packed.reshape(len(packed), -1, 1, width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    found: Bytes = groups >> shifts
    found &= np.uint8((1 << bits) - 1)
    return found.reshape(len(packed), -1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """The 32 bits from byte ``at`` of every block, each as 0 or 16: (blocks, 32)."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _scales_and_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight scales and eight minima of six bits in Q4_K and Q5_K, from (blocks, 12): each (blocks, 8).

    Bytes 0 to 3 hold the first four scales, and in their upper two bits those of the last four; bytes 4 to 7
    hold the same of the minima; bytes 8 to 11 hold the lower four bits of the last scales and minima.
    """
    scales, minima, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    last_scales = (rest & 15) | ((scales >> 6) << 4)
    last_minima = (rest >> 4) | ((minima >> 6) << 4)
    return np.hstack((scales & 63, last_scales)), np.hstack((minima & 63, last_minima))


def _write(out: Floats, q: NDArray[np.generic], scales: Floats, minima: Floats | None = None) -> None:
    """``scales * q + minima`` into ``out``; a scale, (blocks, n), is for as many values as there are to each."""
    parts = out.reshape(*scales.shape, -1)
    np.multiply(q.reshape(parts.shape), scales[:, :, None], out=parts)
    if minima is not None:
        parts += minima[:, :, None]


# ---- values that are not in blocks ---------------------------------------------------------------------------


def _f32(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: Bytes, out: Floats) -> None:
    np.left_shift(blocks.view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


# ---- blocks of 32 --------------------------------------------------------------------------------------------


def _q8_0(blocks: Bytes, out: Floats) -> None:
    _write(out, blocks[:, 2:].view(np.int8), _half(blocks, 0))


def _q4_0(blocks: Bytes, out: Floats) -> None:
    _write(out, _fields(blocks[:, 2:], 4, 16).view(np.int8) - np.int8(8), _half(blocks, 0))


def _q4_1(blocks: Bytes, out: Floats) -> None:
    _write(out, _fields(blocks[:, 4:], 4, 16), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes, out: Floats) -> None:
    q = _fields(blocks[:, 6:], 4, 16) | _fifth_bits(blocks, 2)
    _write(out, q.view(np.int8) - np.int8(16), _half(blocks, 0))


def _q5_1(blocks: Bytes, out: Floats) -> None:
    q = _fields(blocks[:, 8:], 4, 16) | _fifth_bits(blocks, 4)
    _write(out, q, _half(blocks, 0), _half(blocks, 2))


def _iq4_nl(blocks: Bytes, out: Floats) -> None:
    _write(out, _IQ4[_fields(blocks[:, 2:], 4, 16)], _half(blocks, 0))


# ---- blocks of 256 -------------------------------------------------------------------------------------------


def _q2_k(blocks: Bytes, out: Floats) -> None:
    scales, q = blocks[:, :16], _fields(blocks[:, 16:80], 2, 32)
    _write(out, q, _half(blocks, 80) * (scales & 15), -_half(blocks, 82) * (scales >> 4))


def _q3_k(blocks: Bytes, out: Floats) -> None:
    # The third bit is stored inverted: where it is 0, 4 is subtracted. Scales have six bits, offset by 32.
    high = _fields(blocks[:, :32], 1, 32) << np.uint8(2)
    q = (_fields(blocks[:, 32:96], 2, 32) | high).view(np.int8) - np.int8(4)
    scales = _fields(blocks[:, 96:104], 4, 8) | (_fields(blocks[:, 104:108], 2, 4) << np.uint8(4))
    _write(out, q, _half(blocks, 108) * (scales.view(np.int8) - np.int8(32)))


def _q4_k(blocks: Bytes, out: Floats) -> None:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    q = _fields(blocks[:, 16:], 4, 32)
    _write(out, q, _half(blocks, 0) * scales, -_half(blocks, 2) * minima)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    q = _fields(blocks[:, 48:], 4, 32) | (_fields(blocks[:, 16:48], 1, 32) << np.uint8(4))
    _write(out, q, _half(blocks, 0) * scales, -_half(blocks, 2) * minima)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    q = _fields(blocks[:, :128], 4, 64) | (_fields(blocks[:, 128:192], 2, 32) << np.uint8(4))
    scales = blocks[:, 192:208].view(np.int8)
    _write(out, q.view(np.int8) - np.int8(32), _half(blocks, 208) * scales)


def _iq4_xs(blocks: Bytes, out: Floats) -> None:
    # Two bits of each of the eight scales are in bytes 2 and 3, four in bytes 4 to 7; they are offset by 32.
    scales = _fields(blocks[:, 4:8], 4, 1) | (_fields(blocks[:, 2:4], 2, 1) << np.uint8(4))
    q = _IQ4[_fields(blocks[:, 8:], 4, 16)]
    _write(out, q, _half(blocks, 0) * (scales.view(np.int8) - np.int8(32)))


_READERS: dict[str, Callable[[Bytes, Floats], None]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
