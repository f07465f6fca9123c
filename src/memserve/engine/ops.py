"""The parts of a layer that are neither attention nor products with one matrix: norms, rope, activation, experts.

:class:`TorchOps` is the reference on any device; a GPU's backend replaces the parts that its kernels do
faster. Here the residual stream and the norms are float32 even in a bfloat16 run: they cost little on a CPU,
whereas the error of 30 additions in bfloat16 would matter.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import rms_norm, silu

from memserve.engine.rope import rope_table
from memserve.engine.spec import ModelSpec


class HeadWeights(Protocol):
    """Optional weights that a layer applies after projecting q, k and v.

    See :class:`memserve.engine.model.Layer`.
    """

    @property
    def qkv_bias(self) -> torch.Tensor | None:
        """Biases of q, k and v, ((heads + 2 * kv_heads) * head_dim,) float32, or None."""

    @property
    def q_norm(self) -> torch.Tensor | None:
        """Weight of the norm of each head of q, (head_dim,), or None."""

    @property
    def k_norm(self) -> torch.Tensor | None:
        """Weight of the norm of each head of k, (head_dim,), or None."""


class ManyMatrices(Protocol):
    """A weight matrix, which may hold those of all experts; see :class:`memserve.engine.model.Matrix`."""

    @property
    def values(self) -> torch.Tensor:
        """(out, in), those of the experts one after another."""

    def part(self, number: int, parts: int) -> ManyMatrices:
        """One of ``parts`` matrices of equally many rows."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The product of ``x``, (rows, in), and the matrix: (rows, out)."""


class ExpertWeights(Protocol):
    """The weights of a layer's experts; see :class:`memserve.engine.model.Layer`."""

    @property
    def gate_up(self) -> ManyMatrices:
        """(experts * 2 * intermediate, hidden)."""

    @property
    def down(self) -> ManyMatrices:
        """(experts * hidden, intermediate)."""


class Ops(Protocol):
    """One implementation of these parts. Tokens are in the batch's order."""

    residual: torch.dtype
    """Dtype of the residual stream."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Add ``delta`` to the residual stream ``x`` in place, (tokens, hidden), and return its norm in
        ``dtype``.

        May overwrite ``delta``.
        """

    def rotation(self, positions: torch.Tensor) -> Any:
        """What ``qkv`` needs of the tokens' positions, (tokens,); computed once a step."""

    def qkv(
        self, projected: torch.Tensor, layer: HeadWeights, rotation: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim); q and k are rotated.

        May overwrite ``projected``.
        """

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of (tokens, 2 * intermediate), gate first: (tokens, intermediate)."""

    def experts(
        self, x: torch.Tensor, layer: ExpertWeights, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, (tokens, hidden) in the dtype of ``x``.

        ``weights``, ``chosen``: of ``chosen_experts``.
        """


def chosen_experts(logits: torch.Tensor, spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of each token's experts, float32, and their numbers, int64: both (tokens, experts_used).

    ``logits``: of the router, (tokens, experts) float32. Of equal ones, the lower number is chosen.
    """
    ordered, numbers = torch.sort(logits, dim=-1, descending=True, stable=True)
    best = ordered[:, : spec.experts_used]
    total = torch.logsumexp(best if spec.experts_normed else ordered, dim=-1, keepdim=True)
    return (best - total).exp(), numbers[:, : spec.experts_used]


class TorchOps:
    """The reference implementation in torch; see :class:`Ops`."""

    residual = torch.float32

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype = spec, dtype
        cosines, sines = (torch.from_numpy(table) for table in rope_table(spec))
        # Rotation by halves: x * cos + swap(x) * sin. The first half's sine is negated here once, instead of
        # x in each call.
        self._cosines = torch.cat((cosines, cosines), dim=-1).to(device)
        self._sines = torch.cat((-sines, sines), dim=-1).to(device)

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        if delta is not None:
            x += delta
        return rms_norm(x, (self.spec.hidden,), weight, self.spec.rms_eps).to(dtype)

    def rotation(self, positions: torch.Tensor) -> Any:
        return self._cosines[positions][:, None, :], self._sines[positions][:, None, :]

    def qkv(
        self, projected: torch.Tensor, layer: HeadWeights, rotation: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        spec = self.spec
        if layer.qkv_bias is not None:
            # Float32 until rope is done: k biases in the hundreds would cost bfloat16 its low digits.
            projected = projected.float().add_(layer.qkv_bias)
        heads = projected.view(len(projected), -1, spec.head_dim)
        qk, v = heads[:, : spec.heads + spec.kv_heads], heads[:, spec.heads + spec.kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = qk.float()
            q = rms_norm(qk[:, : spec.heads], (spec.head_dim,), layer.q_norm, spec.rms_eps)
            k = rms_norm(qk[:, spec.heads :], (spec.head_dim,), layer.k_norm, spec.rms_eps)
            qk = torch.cat((q, k), dim=1)
        rotated = self._rotate(qk, *rotation)
        return rotated[:, : spec.heads], rotated[:, spec.heads :], v.to(self.dtype)

    def _rotate(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Rotary position embedding of (tokens, heads, head_dim), computed in float32."""
        x = x.float()
        half = self.spec.head_dim // 2
        swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
        return (x * cosines).addcmul_(swapped, sines).to(self.dtype)

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    def experts(
        self, x: torch.Tensor, layer: ExpertWeights, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        count = self.spec.experts
        found = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, rank = (chosen == expert).nonzero(as_tuple=True)
            inner = self.swiglu(layer.gate_up.part(expert, count).apply(x[rows]))
            found[rows] += layer.down.part(expert, count).apply(inner).float() * weights[rows, rank, None]
        return found.to(x.dtype)
