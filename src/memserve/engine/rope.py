"""Rotary position embedding: the table of angles that all engines share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memserve.engine.spec import ModelSpec


def rope_table(spec: ModelSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines of every position, each (max_context, head_dim / 2) float32.

    Angles are float32, as in transformers, and their cosines are rounded from float64, so that they do not
    depend on the processor.
    """
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float32) / np.float32(spec.head_dim)
    frequencies = (1.0 / np.float64(spec.rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    if spec.rope_factors is not None:
        frequencies /= np.array(spec.rope_factors, np.float32)
    angles = np.arange(spec.max_context, dtype=np.float32)[:, None] * frequencies
    wide = angles.astype(np.float64)
    scale = spec.rope_scale
    return (np.cos(wide) * scale).astype(np.float32), (np.sin(wide) * scale).astype(np.float32)
