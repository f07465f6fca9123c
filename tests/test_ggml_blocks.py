"""Every tensor type of GGUF files against the ``gguf`` package, which llama.cpp's own converter uses."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from memserve.engine.ggml_blocks import dequantise
from memserve.engine.gguf import BLOCKS, GGML_NAMES, TensorInfo

QUANTISED = [name for name in BLOCKS if name not in ("F32", "F16", "BF16")]
HALVES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Bytes of a block at which a float16 begins; at 0 if not listed."""


def random_blocks(name: str, count: int) -> np.ndarray:
    """Blocks of random bits, (count, bytes), whose float16 are finite and of either sign."""
    generator = np.random.default_rng(len(name) * count)
    blocks = generator.integers(0, 256, (count, BLOCKS[name][1]), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        halves = generator.normal(size=(count, 1)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks


def read(name: str, blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return dequantise(memoryview(blocks.tobytes()), TensorInfo("w", shape, name, 0, blocks.nbytes))


def test_numbers_and_sizes_of_types_are_ggmls():
    """A file's tensors would be read from the wrong places, or as another type."""
    for number, name in GGML_NAMES.items():
        assert gguf.GGMLQuantizationType(number).name == name
    for name, block in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == block


@pytest.mark.parametrize("name", QUANTISED)
def test_values_are_those_of_llama_cpp(name):
    """A model would load and answer nonsense, or answer slightly worse than its weights allow."""
    values, _ = BLOCKS[name]
    # More than one piece of the conversion, and a last piece that is shorter.
    blocks = random_blocks(name, 2 * (35_000 // values))
    found = read(name, blocks, (len(blocks) // 2, 2, values))
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])

    assert found.dtype == np.float32 and found.shape == (len(blocks) // 2, 2, values)
    assert np.array_equal(found.reshape(expected.shape), expected)
    assert len(np.unique(found)) > 1000


@pytest.mark.parametrize("name", BLOCKS)
def test_one_block_is_read_and_copied(name):
    """A single row, the least that a file can hold, would fail, or change when the file is unmapped."""
    values, size = BLOCKS[name]
    raw = bytearray(size)
    found = dequantise(memoryview(raw), TensorInfo("w", (values,), name, 0, size))
    raw[:] = b"\1" * size

    assert not found.any()
