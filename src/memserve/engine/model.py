"""The forward pass of Llama and its relatives, in one file: token ids and paged KV in, logits out.

Written from the architecture's description (Touvron et al., 2023). What a family adds to it (biases, norms of
q and k) is in the spec's features; sliding windows are the attention backend's. The tests compare it with
transformers' models. One forward pass serves CPUs and GPUs; only the attention backend and the
:class:`~memserve.engine.ops.Ops` differ. The weights come from :mod:`memserve.engine.weights`; nothing here
owns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import attrs
import torch
from torch.nn.functional import embedding, linear

from memserve.engine.convert import SCALE
from memserve.engine.ops import Ops, TorchOps, chosen_experts
from memserve.engine.plans import BatchPlan
from memserve.engine.spec import ModelSpec
from memserve.kernels import AttentionBackend
from memserve.tokens import unpack

_IN_PLACE = 16
"""Most rows for which int8 weights are read as they are; for more, converting them first is faster."""
_ROW_BY_ROW = 8
"""Most rows for which any processor reads bfloat16 weights as they are; for more, widening them is faster."""
_WIDENED = 1 << 20
"""Values converted to another type at a time: few enough to stay in cache, and no whole matrix is copied."""


@attrs.frozen
class BatchTensors:
    """A batch plan as tensors, with the tokens of all rows concatenated."""

    ids: torch.Tensor
    """Token ids, (tokens,) int64."""
    positions: torch.Tensor
    """Positions of the tokens, (tokens,) int64."""
    wanted: torch.Tensor
    """(wanted rows,) int64: indices in the batch of the tokens whose logits are needed."""

    @classmethod
    def of(cls, plan: BatchPlan) -> BatchTensors:
        """Build the tensors of a plan."""
        ids: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for row in plan.rows:
            ids.extend(unpack(row.tokens))
            positions.extend(range(row.start, row.end))
            if row.sample is not None:
                wanted.append(len(ids) - 1)
        return cls(torch.tensor(ids), torch.tensor(positions), torch.tensor(wanted, dtype=torch.int64))


@attrs.frozen
class Matrix:
    """A weight matrix, (out, in): in the run's dtype, or int8 with one scale per row."""

    values: torch.Tensor
    scale: torch.Tensor | None = None
    """(out,) in the run's dtype, which represents the scales that ``quantise_rows`` makes exactly."""

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> Matrix:
        """The matrix called ``name``, for a run in ``dtype``."""
        scale = weights.get(name + SCALE)
        return cls(weights[name], None if scale is None else scale.to(dtype))

    def part(self, number: int, parts: int) -> Matrix:
        """One of ``parts`` matrices of equally many rows that follow one another in this one."""
        first, end = (at * len(self.values) // parts for at in (number, number + 1))
        return Matrix(self.values[first:end], None if self.scale is None else self.scale[first:end])

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The rows with the numbers ``ids``, as (ids, in) in ``dtype``."""
        found = embedding(ids, self.values).to(dtype)
        return found if self.scale is None else found.mul_(self.scale[ids].to(dtype)[:, None])

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The product of ``x``, (rows, in), and the matrix: (rows, out) in the dtype of ``x``."""
        wide = _multiplied(x)
        if self.scale is None and wide == x.dtype:
            return linear(x, self.values)
        if self.scale is not None and self._is_read_in_place(x):
            return torch._weight_int8pack_mm(x, self.values, self.scale)
        parts = torch.split(self.values, max(1, _WIDENED // self.values.shape[1]))
        # Widening to either type is exact, and the scales multiply the finished sums.
        found = torch.cat([linear(x.to(wide), part.to(wide)) for part in parts], dim=1)
        return (found if self.scale is None else found.mul_(self.scale)).to(x.dtype)

    def _is_read_in_place(self, x: torch.Tensor) -> bool:
        """Whether torch can multiply by the int8 values as they are.

        torch 2.13 reads rows in aligned pieces without checking: unaligned data ends in a segmentation fault.
        """
        aligned = self.values.shape[1] % 64 == 0 and self.values.data_ptr() % 64 == 0
        return aligned and self.values.is_cpu and x.dtype == torch.bfloat16 and 0 < len(x) <= _IN_PLACE


def _multiplied(x: torch.Tensor) -> torch.dtype:
    """The type to multiply ``x`` in: float32 for many rows where the processor has no bfloat16 products.

    There torch 2.13 multiplies bfloat16 row by row, which for a prompt takes sixty times as long as float32.
    """
    many = x.dtype == torch.bfloat16 and x.is_cpu and len(x) > _ROW_BY_ROW
    return torch.float32 if many and not has_bfloat16_products() else x.dtype


@cache
def has_bfloat16_products() -> bool:
    """Whether this processor has instructions for bfloat16 products that torch uses."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


@attrs.frozen
class Layer:
    """The weights of one layer."""

    attn_norm: torch.Tensor  # (hidden,) float32
    qkv: Matrix  # ((heads + 2 * kv_heads) * head_dim, hidden)
    o: Matrix  # (hidden, heads * head_dim)
    mlp_norm: torch.Tensor  # (hidden,) float32
    gate_up: Matrix  # (2 * intermediate, hidden), or those of all experts, one after another
    down: Matrix  # (hidden, intermediate), or those of all experts
    router: torch.Tensor | None = None  # (experts, hidden) float32
    qkv_bias: torch.Tensor | None = None  # ((heads + 2 * kv_heads) * head_dim,) float32
    q_norm: torch.Tensor | None = None  # (head_dim,) float32
    k_norm: torch.Tensor | None = None  # (head_dim,) float32

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], layer: int, dtype: torch.dtype) -> Layer:
        """The weights of layer number ``layer``, as far as the model has them."""
        found: dict[str, Any] = {}
        for field in attrs.fields(cls):
            key = f"{layer}.{field.name}"
            if key not in weights:
                continue
            if field.name == "router":
                found[field.name] = weights[key].float()
            else:
                found[field.name] = Matrix.of(weights, key, dtype) if weights[key].ndim == 2 else weights[key]
        return cls(**found)


class Llama:
    """The forward pass, on whichever device the weights are on."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, torch.Tensor],
        dtype: torch.dtype | None = None,
        ops: Ops | None = None,
    ) -> None:
        """Use ``weights`` as they are, without copying them.

        ``dtype``: of activations and KV; unset, that of the matrices. It is required if these are int8.
        ``ops``: unset, torch's.
        """
        self.spec = spec
        self.dtype = dtype or weights["embed"].dtype
        if not self.dtype.is_floating_point:
            raise ValueError(f"a model cannot run in {self.dtype}: name the dtype of the activations")
        self._embed = Matrix.of(weights, "embed", self.dtype)  # (vocab, hidden)
        self._head = Matrix.of(weights, "head", self.dtype) if "head" in weights else self._embed
        self._norm = weights["norm"]  # (hidden,)
        self._layers = [Layer.of(weights, layer, self.dtype) for layer in range(spec.layers)]
        self._ops = ops or TorchOps(spec, self.dtype, self._norm.device)

    def forward(
        self,
        batch: BatchTensors,
        plan: Any,
        attention: AttentionBackend[Any],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (wanted rows, vocab) float32, written to ``out`` if it is given.

        Appends every token's K and V to the pages that ``plan`` names.
        """
        x, delta = self.layers(batch, plan, attention)
        return self.head(x, delta, batch.wanted, out)

    def layers(
        self, batch: BatchTensors, plan: Any, attention: AttentionBackend[Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run all layers and return the two arguments of :meth:`head`, each (tokens, hidden)."""
        spec, ops, dtype = self.spec, self._ops, self.dtype
        x = self._embed.rows(batch.ids, ops.residual)  # (tokens, hidden)
        rotation = ops.rotation(batch.positions)
        attended = torch.empty(len(x), spec.heads, spec.head_dim, dtype=dtype, device=x.device)
        delta = None
        for index, layer in enumerate(self._layers):
            normed = ops.add_norm(x, delta, layer.attn_norm, dtype)
            q, k, v = ops.qkv(layer.qkv.apply(normed), layer, rotation)
            attention.run(plan, index, q, k, v, attended)
            normed = ops.add_norm(x, layer.o.apply(attended.view(len(x), -1)), layer.mlp_norm, dtype)
            delta = self._mlp(normed, layer)
        assert delta is not None, "a model without layers"
        return x, delta

    def _mlp(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        """The MLP of a layer, or those of its experts that each token runs through: (tokens, hidden)."""
        if layer.router is None:
            # (tokens, intermediate) -> (tokens, hidden)
            return layer.down.apply(self._ops.swiglu(layer.gate_up.apply(x)))
        weights, chosen = chosen_experts(linear(x.float(), layer.router), self.spec)
        return self._ops.experts(x, layer, weights, chosen)

    def head(
        self, x: torch.Tensor, delta: torch.Tensor, places: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits (places, vocab) float32 after the tokens at ``places``, (places,) int64.

        Leaves ``x`` and ``delta`` unchanged.
        """
        normed = self._ops.add_norm(x[places], delta[places], self._norm, self.dtype)
        logits = self._head.apply(normed)
        return logits.float() if out is None else out.copy_(logits)
