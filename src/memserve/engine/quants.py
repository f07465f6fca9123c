"""Rounds float32 to bfloat16 or int8, vectorised. A model of 135 M parameters takes about a second."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_PIECE = 1 << 18
"""Number of values rounded at a time."""


def round_to_bfloat16(values: Floats) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 values, ties to even, as hardware rounds.

    NaN stays NaN. Same shape.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    rounded = np.empty(flat.size, np.uint16)
    # In pieces that stay in the cache: the temporaries for a whole embedding table would take half a GB.
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        bits = piece.view(np.uint32)
        target = rounded[start : start + _PIECE]
        target[:] = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        # The carry of the rounding could turn a NaN into an infinity.
        target[np.isnan(piece)] = 0x7FC0
    return rounded.reshape(values.shape)


def quantise_rows(values: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Quantise (out, in) to int8, from -127 to 127, and one scale per row, (out,): values are int8 * scale.

    A scale is the row's greatest magnitude over 127. It is rounded to a number that bfloat16 represents, too,
    before the row is divided by it, so that every engine multiplies by exactly the same number. Scales that
    clip, chosen for the least squared error, were no better: 0.4 % less error in the weights of SmolLM2, the
    same NLL and argmax agreement. Raises ValueError for NaN and infinities, which int8 cannot represent.
    """
    rows, width = values.shape
    quantised, scales = np.empty((rows, width), np.int8), np.empty(rows, np.float32)
    step = max(1, _PIECE // width)
    for start in range(0, rows, step):
        piece = values[start : start + step]
        bits = round_to_bfloat16(np.abs(piece).max(axis=1) / np.float32(127))
        scale = (bits.astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(scale).all():
            raise ValueError("values that are not finite")
        scales[start : start + step] = scale
        # A row of zeros has the scale 0.
        divided = piece / np.where(scale > 0, scale, 1)[:, None]
        np.rint(divided, out=divided)
        quantised[start : start + step] = np.clip(divided, -127, 127, out=divided)
    return quantised, scales
