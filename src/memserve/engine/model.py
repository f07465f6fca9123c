"""Llama and its relatives in one file: token ids and paged KV in, logits out.

Written from the architecture's description (Touvron et al., 2023); what a family does beyond it (biases, norms of q
and k) is in the spec's features. Held to transformers' models in the tests. The residual stream and the norms are float32 also in a bfloat16 run: they cost little, and the error of
30 additions in bfloat16 would not. Weights are those of :mod:`memserve.engine.weights`; nothing here owns them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch.nn.functional import embedding, linear, rms_norm, silu

from memserve.engine.plans import BatchPlan
from memserve.engine.spec import ModelSpec
from memserve.kernels import AttentionBackend
from memserve.tokens import unpack

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows, in) and a weight (out, in) to (rows, out), in the weight's dtype."""


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
class _Layer:
    attn_norm: torch.Tensor  # (hidden,) float32
    qkv: torch.Tensor  # ((heads + 2 * kv_heads) * head_dim, hidden)
    o: torch.Tensor  # (hidden, heads * head_dim)
    mlp_norm: torch.Tensor  # (hidden,) float32
    gate_up: torch.Tensor  # (2 * intermediate, hidden)
    down: torch.Tensor  # (hidden, intermediate)
    qkv_bias: torch.Tensor | None = None  # ((heads + 2 * kv_heads) * head_dim,) float32
    q_norm: torch.Tensor | None = None  # (head_dim,) float32
    k_norm: torch.Tensor | None = None  # (head_dim,) float32


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

    def __init__(self, spec: ModelSpec, weights: Mapping[str, torch.Tensor], apply: Linear = linear) -> None:
        self.spec = spec
        self.dtype = weights["embed"].dtype
        self._linear = apply
        self._embed = weights["embed"]  # (vocab, hidden)
        self._head = weights.get("head", self._embed)  # (vocab, hidden)
        self._norm = weights["norm"]  # (hidden,)
        names = [field.name for field in attrs.fields(_Layer)]
        self._layers = [
            _Layer(**{name: weights[key] for name in names if (key := f"{layer}.{name}") in weights})
            for layer in range(spec.layers)
        ]
        self.rope = cosines, sines = rope_table(spec)
        # Rotation by halves: x * cos + swap(x) * sin, the first half's sine negated here once instead of x each time.
        signs = torch.ones(spec.head_dim)
        signs[: spec.head_dim // 2] = -1
        self._cosines, self._sines = cosines.to(self._embed.device), (sines * signs).to(self._embed.device)

    def forward(self, batch: Batch, plan: Any, attention: AttentionBackend[Any]) -> torch.Tensor:
        """Logits (wanted rows, vocab) float32. Appends every token's K and V to the pages that ``plan`` names."""
        spec = self.spec
        x = embedding(batch.ids, self._embed).float()  # (tokens, hidden)
        cosines = self._cosines[batch.positions][:, None, :]  # (tokens, 1, head_dim)
        sines = self._sines[batch.positions][:, None, :]
        attended = torch.empty(len(x), spec.heads, spec.head_dim, dtype=self.dtype, device=x.device)
        for index, layer in enumerate(self._layers):
            qk, v = self._project(x, layer)
            rotated = self._rotate(qk, cosines, sines)
            q, k = rotated[:, : spec.heads], rotated[:, spec.heads :]
            attention.run(plan, index, q, k, v, attended)
            x += self._linear(attended.view(len(x), -1), layer.o)
            gate, up = self._linear(self._normed(x, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            x += self._linear(silu(gate).mul_(up), layer.down)  # (tokens, intermediate) -> (tokens, hidden)
        return self._linear(self._normed(x[batch.wanted], self._norm), self._head).float()

    def _project(self, x: torch.Tensor, layer: _Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k side by side, (tokens, heads + kv_heads, head_dim), and v in the model's dtype."""
        spec = self.spec
        qkv = self._linear(self._normed(x, layer.attn_norm), layer.qkv)
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
