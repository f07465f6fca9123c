"""Llama and its relatives in one file: token ids and paged KV in, logits out.

Written from the architecture's description (Touvron et al., 2023); what a family does beyond it (biases, norms of q
and k) is in the spec's features. Held to transformers' models in the tests. The residual stream and the norms are float32 also in a bfloat16 run: they cost little, and the error of
30 additions in bfloat16 would not. Weights are those of :mod:`memserve.engine.weights`; nothing here owns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch.nn.functional import embedding, linear, rms_norm, silu

from memserve.engine.convert import SCALE
from memserve.engine.plans import BatchPlan
from memserve.engine.spec import ModelSpec
from memserve.kernels import AttentionBackend
from memserve.tokens import unpack

_IN_PLACE = 16
"""Rows up to which int8 weights are read as they are; for more, turning them into the run's dtype first is faster."""
_WIDENED = 1 << 20
"""int8 values turned into the run's dtype at a time: they stay in the caches, and add no copy of a whole matrix."""


@attrs.frozen
class Batch:
    """A batch plan as tensors: the tokens of all rows, one after another."""

    ids: torch.Tensor
    """(tokens,) int64."""
    positions: torch.Tensor
    """(tokens,) int64."""
    wanted: torch.Tensor
    """(wanted rows,) int64: the tokens whose logits somebody wants."""

    @classmethod
    def of(cls, plan: BatchPlan) -> Batch:
        """The tensors of a plan."""
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
    """A weight matrix, (out, in): in the run's dtype, or int8 with a scale for each row."""

    values: torch.Tensor
    scale: torch.Tensor | None = None
    """(out,) in the run's dtype, which holds what ``quantise_rows`` makes exactly."""

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], name: str, dtype: torch.dtype) -> Matrix:
        """The matrix of that name, for a run in ``dtype``."""
        scale = weights.get(name + SCALE)
        return cls(weights[name], None if scale is None else scale.to(dtype))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of these numbers, (ids, in) float32."""
        found = embedding(ids, self.values).float()
        return found if self.scale is None else found.mul_(self.scale[ids].float()[:, None])

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """``x``, (rows, in), times the matrix: (rows, out), in the dtype of ``x``."""
        if self.scale is None:
            return linear(x, self.values)
        if 0 < len(x) <= _IN_PLACE and x.dtype == torch.bfloat16 and self._can_be_read_in_place:
            return torch._weight_int8pack_mm(x, self.values, self.scale)
        parts = torch.split(self.values, max(1, _WIDENED // self.values.shape[1]))
        # bfloat16 holds every int8 exactly, and the scales multiply what has been summed up.
        return torch.cat([linear(x, part.to(x.dtype)) for part in parts], dim=1).mul_(self.scale)

    @property
    def _can_be_read_in_place(self) -> bool:
        """torch 2.13 reads rows in aligned pieces and does not check; what is not aligned is a segmentation fault."""
        aligned = self.values.shape[1] % 64 == 0 and self.values.data_ptr() % 64 == 0
        return aligned and self.values.is_cpu


@attrs.frozen
class _Layer:
    attn_norm: torch.Tensor  # (hidden,) float32
    qkv: Matrix  # ((heads + 2 * kv_heads) * head_dim, hidden)
    o: Matrix  # (hidden, heads * head_dim)
    mlp_norm: torch.Tensor  # (hidden,) float32
    gate_up: Matrix  # (2 * intermediate, hidden)
    down: Matrix  # (hidden, intermediate)
    qkv_bias: torch.Tensor | None = None  # ((heads + 2 * kv_heads) * head_dim,) float32
    q_norm: torch.Tensor | None = None  # (head_dim,) float32
    k_norm: torch.Tensor | None = None  # (head_dim,) float32

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], layer: int, dtype: torch.dtype) -> _Layer:
        """The weights of one layer that the model has."""
        found: dict[str, Any] = {}
        for field in attrs.fields(cls):
            key = f"{layer}.{field.name}"
            if key in weights:
                found[field.name] = Matrix.of(weights, key, dtype) if weights[key].ndim == 2 else weights[key]
        return cls(**found)


def rope_table(spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position, (max_context, head_dim) float32, each half of the head alike."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / spec.rope_theta**exponents  # (head_dim / 2,)
    if spec.rope_factors is not None:
        frequencies /= torch.tensor(spec.rope_factors)
    angles = torch.arange(spec.max_context).float()[:, None] * frequencies  # (max_context, head_dim / 2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class Llama:
    """The forward pass. Runs on whatever device its weights are on."""

    def __init__(
        self, spec: ModelSpec, weights: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None
    ) -> None:
        """``dtype``: of activations and KV; unset, that of the matrices. Needed where these are int8."""
        self.spec = spec
        self.dtype = dtype or weights["embed"].dtype
        if not self.dtype.is_floating_point:
            raise ValueError(f"a model cannot run in {self.dtype}: name the dtype of the activations")
        self._embed = Matrix.of(weights, "embed", self.dtype)  # (vocab, hidden)
        self._head = Matrix.of(weights, "head", self.dtype) if "head" in weights else self._embed
        self._norm = weights["norm"]  # (hidden,)
        self._layers = [_Layer.of(weights, layer, self.dtype) for layer in range(spec.layers)]
        self.rope = cosines, sines = rope_table(spec)
        # Rotation by halves: x * cos + swap(x) * sin, the first half's sine negated here once instead of x each time.
        signs = torch.ones(spec.head_dim)
        signs[: spec.head_dim // 2] = -1
        device = self._norm.device
        self._cosines, self._sines = cosines.to(device), (sines * signs).to(device)

    def forward(self, batch: Batch, plan: Any, attention: AttentionBackend[Any]) -> torch.Tensor:
        """Logits (wanted rows, vocab) float32. Appends every token's K and V to the pages that ``plan`` names."""
        spec = self.spec
        x = self._embed.rows(batch.ids)  # (tokens, hidden)
        cosines = self._cosines[batch.positions][:, None, :]  # (tokens, 1, head_dim)
        sines = self._sines[batch.positions][:, None, :]
        attended = torch.empty(len(x), spec.heads, spec.head_dim, dtype=self.dtype, device=x.device)
        for index, layer in enumerate(self._layers):
            qk, v = self._project(x, layer)
            rotated = self._rotate(qk, cosines, sines)
            q, k = rotated[:, : spec.heads], rotated[:, spec.heads :]
            attention.run(plan, index, q, k, v, attended)
            x += layer.o.apply(attended.view(len(x), -1))
            gate, up = layer.gate_up.apply(self._normed(x, layer.mlp_norm)).chunk(2, dim=-1)
            x += layer.down.apply(silu(gate).mul_(up))  # (tokens, intermediate) -> (tokens, hidden)
        return self._head.apply(self._normed(x[batch.wanted], self._norm)).float()

    def _project(self, x: torch.Tensor, layer: _Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k side by side, (tokens, heads + kv_heads, head_dim), and v in the model's dtype."""
        spec = self.spec
        qkv = layer.qkv.apply(self._normed(x, layer.attn_norm))
        if layer.qkv_bias is not None:
            # In float32, and so it stays until rope is done: biases of k in the hundreds would eat bfloat16's digits.
            qkv = qkv.float().add_(layer.qkv_bias)
        qkv = qkv.view(len(x), -1, spec.head_dim)
        qk, v = qkv[:, : spec.heads + spec.kv_heads], qkv[:, spec.heads + spec.kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = qk.float()
            q = rms_norm(qk[:, : spec.heads], (spec.head_dim,), layer.q_norm, spec.rms_eps)
            k = rms_norm(qk[:, spec.heads :], (spec.head_dim,), layer.k_norm, spec.rms_eps)
            qk = torch.cat((q, k), dim=1)
        return qk, v.to(self.dtype)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (self.spec.hidden,), weight, self.spec.rms_eps).to(self.dtype)

    def _rotate(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Rotary position embedding of (tokens, heads, head_dim), computed in float32."""
        x = x.float()
        half = self.spec.head_dim // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        return (x * cosines).addcmul_(swapped, sines).to(self.dtype)
