"""Converts a checkpoint's tensors to the engine's weights, with one tensor in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from memserve.engine.checkpoint import Checkpoint
from memserve.engine.ggml_blocks import dequantise
from memserve.engine.quants import quantise_rows, round_to_bfloat16
from memserve.engine.spec import STORED_BYTES, ModelSpec
from memserve.engine.tiles import STRIP, tiles_shape, to_tiles, whole_strips
from memserve.errors import UserError

Values = NDArray[Any]
"""Values of a tensor: float32, bfloat16 as uint16 bits, or int8."""

ROUTER = ".router"
"""Suffix of the name of a layer's router."""
SCALE = ".scale"
"""Suffix of the name of an int8 matrix's scales, (out,) float32."""


@attrs.frozen
class Tensor:
    """One tensor of the converted file."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of its values in bytes."""
        return prod(self.shape) * STORED_BYTES[self.dtype]


@attrs.frozen
class Weight:
    """A unit of conversion: one tensor, or an int8 matrix and its scales."""

    tensors: tuple[Tensor, ...]
    pieces: Callable[[], Iterator[tuple[Values, ...]]]
    """Make the values of each tensor piece by piece, each some of the rows; called only when they are written."""


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, matrices as (out, in). These are all the weight names that a model has.

    ``gate_up`` and ``down`` of a layer with experts hold those of all experts, one expert after another.
    Vectors (norm weights and biases) are float32; matrices have the requested type. The scales of an int8
    matrix are a weight of their own, under the matrix's name plus ``SCALE``.
    """
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.vocab, spec.hidden)}
    for layer in range(spec.layers):
        shapes |= {
            f"{layer}.attn_norm": (spec.hidden,),
            f"{layer}.qkv": (q + 2 * kv, spec.hidden),
            f"{layer}.o": (spec.hidden, q),
            f"{layer}.mlp_norm": (spec.hidden,),
            f"{layer}.gate_up": (spec.mlps * 2 * spec.intermediate, spec.hidden),
            f"{layer}.down": (spec.mlps * spec.hidden, spec.intermediate),
        }
        if spec.experts:
            shapes[f"{layer}.router"] = (spec.experts, spec.hidden)
        if spec.qkv_bias:
            shapes[f"{layer}.qkv_bias"] = (q + 2 * kv,)
        if spec.qk_norm:
            shapes |= {f"{layer}.q_norm": (spec.head_dim,), f"{layer}.k_norm": (spec.head_dim,)}
    shapes["norm"] = (spec.hidden,)
    if not spec.tied_embeddings:
        shapes["head"] = (spec.vocab, spec.hidden)
    return shapes


def stored_as(name: str, shape: tuple[int, ...], stored: str) -> str:
    """The type of a weight in a model whose matrices are ``stored`` in the given type.

    A router is never int8: it is small, and another choice of experts costs more than rounding.
    """
    if len(shape) == 1:
        return "float32"
    return "bfloat16" if stored == "int8" and name.endswith(ROUTER) else stored


def conversion(model: Checkpoint, stored: str, tiled: bool) -> list[Weight]:
    """The weights to write, after checking that the checkpoint holds exactly this model's tensors in the
    right shapes.

    ``stored``: the type of matrices. ``tiled``: store them in tiles, not as rows. Their ``pieces`` are
    read from the checkpoint, so it must stay open. Raises UserError.
    """
    parts = {part for sources in model.sources.values() for part in sources}
    if missing := sorted(parts - model.tensors.keys()):
        raise UserError(f"{model.path}: tensors are missing: {', '.join(missing[:4])}")
    unknown = [
        name for name in model.tensors if name not in parts and not name.endswith(model.ignored_suffixes)
    ]
    if unknown:
        raise UserError(
            f"{model.path}: {len(unknown)} tensors are not part of a {model.spec.architecture} model as it is "
            f"supported, {unknown[0]!r} for one; without them it would answer nonsense"
        )
    weights = [_planned(model, name, shape, stored) for name, shape in weight_shapes(model.spec).items()]
    return [_tiled(weight) if tiled and len(weight.tensors[0].shape) > 1 else weight for weight in weights]


def _planned(model: Checkpoint, name: str, shape: tuple[int, ...], stored: str) -> Weight:
    parts = model.sources[name]
    found = [model.tensors[part].shape for part in parts]
    if sum(one[0] for one in found if one) != shape[0] or {one[1:] for one in found} != {shape[1:]}:
        raise UserError(f"{model.path}: {parts} have shapes {found}, expected {shape} together")
    target = stored_as(name, shape, stored)
    tensors = [Tensor(name, shape, target)]
    if target == "int8":
        tensors.append(Tensor(name + SCALE, shape[:1], "float32"))

    def pieces() -> Iterator[tuple[Values, ...]]:
        # Parts follow one another by row, and each row is quantised on its own. So no more than one part is in
        # memory: the experts of one layer may take gigabytes.
        for part in parts:
            yield _quantised(model, part) if target == "int8" else (_values(model, part, target),)

    return Weight(tuple(tensors), pieces)


def _tiled(weight: Weight) -> Weight:
    """The matrix in tiles, and its scales, if any, padded to whole strips.

    All pieces but the last have whole strips of rows, because the widths of a model with tiles are multiples of
    a strip.
    """
    matrix, *scales = weight.tensors
    whole = [attrs.evolve(scale, shape=(-(-scale.shape[0] // STRIP) * STRIP,)) for scale in scales]

    def pieces() -> Iterator[tuple[Values, ...]]:
        for values, *scales in weight.pieces():
            yield to_tiles(values), *(whole_strips(scale) for scale in scales)

    tiles = attrs.evolve(matrix, shape=tiles_shape(*matrix.shape))
    return Weight((tiles, *whole), pieces)


def _quantised(model: Checkpoint, part: str) -> tuple[Values, ...]:
    values = _values(model, part, "float32")
    try:
        return quantise_rows(values)
    except ValueError as error:
        raise UserError(
            f'{model.path}: tensor {part!r} holds {error}, which int8 cannot hold: set model.weights to "dtype"'
        ) from error


def _values(model: Checkpoint, part: str, dtype: str) -> Values:
    tensor = model.tensors[part]
    raw = model.data(tensor)
    values: Values
    if tensor.type == "BF16" and dtype == "bfloat16":
        values = np.frombuffer(raw, "<u2").reshape(tensor.shape).copy()
    else:
        floats = dequantise(raw, tensor)
        values = round_to_bfloat16(floats) if dtype == "bfloat16" else floats
    return _unpermute(values, model.spec.head_dim) if part.endswith(model.interleaved_suffixes) else values


def _unpermute(weight: Values, head_dim: int) -> Values:
    """Undo llama.cpp's interleaving of the two rope halves in the rows of q and k, (heads * head_dim, in)."""
    out, inner = weight.shape
    pairs = weight.reshape(out // head_dim, head_dim // 2, 2, inner)
    return pairs.swapaxes(1, 2).reshape(out, inner)


def save_tokenizer(model: Checkpoint, path: Path) -> None:
    """Write the model's tokenizer.json. Raises UserError when it cannot be read, built or served."""
    # Only a conversion needs the tokenizer library.
    from memserve.engine.gguf_tokenizer import build_tokenizer
    from memserve.engine.tokenizer import Tokenizer

    if isinstance(model.tokenizer, Path):
        # A tokenizer that cannot be served is refused now, not by a Frontend once everything else has
        # started.
        ids = Tokenizer.load(model.tokenizer).vocabulary
        shutil.copyfile(model.tokenizer, path)
    else:
        built = build_tokenizer(model.tokenizer)
        ids = built.get_vocab_size()
        built.save(str(path))
    if ids > model.spec.vocab:
        raise UserError(
            f"{model.path}: the tokenizer has ids up to {ids - 1}, the embedding table up to {model.spec.vocab - 1}: they "
            "are not of one model; where it is an added token that is too many, take it out of tokenizer.json"
        )
