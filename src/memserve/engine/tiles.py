"""Arranges matrices in the order in which the native step reads them; see ``kernels/native/tiles.hpp``.

A matrix (out, in) becomes (out / 16, in / 32, 16, 16, 2): strips of 16 outputs, tiles of 32 values along
``in``, pairs of values, the strip's outputs, the two values of a pair. Outputs are padded with zeros to whole
strips.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

STRIP = 16
"""Outputs of a strip."""
TILE = 32
"""Values along ``in`` of a tile; ``in`` must be a multiple."""


def tiles_shape(outputs: int, width: int) -> tuple[int, ...]:
    """The shape of a matrix (outputs, width) in tiles."""
    return (-(-outputs // STRIP), width // TILE, TILE // 2, STRIP, 2)


def to_tiles(matrix: NDArray[Any]) -> NDArray[Any]:
    """A copy of the matrix (out, in), of any type, in tiles."""
    strips, tiles, *_ = tiles_shape(*matrix.shape)
    pairs = whole_strips(matrix).reshape(strips, STRIP, tiles, TILE // 2, 2)
    return np.ascontiguousarray(pairs.transpose(0, 2, 3, 1, 4))


def to_rows(tiles: NDArray[Any], outputs: int) -> NDArray[Any]:
    """A copy of the matrix (outputs, in) that ``to_tiles`` made ``tiles`` from."""
    rows = tiles.transpose(0, 3, 1, 2, 4).reshape(len(tiles) * STRIP, -1)
    return np.ascontiguousarray(rows[:outputs])


def whole_strips(outputs: NDArray[Any]) -> NDArray[Any]:
    """``outputs``, one value or row for each output, padded with zeros to whole strips."""
    missing = -len(outputs) % STRIP
    return np.pad(outputs, [(0, missing), *[(0, 0)] * (outputs.ndim - 1)]) if missing else outputs
