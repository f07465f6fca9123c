"""Norms, rope and activation of a layer in FlashInfer's fused kernels.

The library is passed in; this module does not import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from memserve.engine.ops import ExpertWeights, HeadWeights, TorchOps
from memserve.engine.rope import rope_table
from memserve.engine.spec import ModelSpec
from memserve.kernels.flashinfer_kit import Library


class FlashInferOps(TorchOps):
    """Norms, rope and activation in fused kernels; see :class:`~memserve.engine.ops.Ops`.

    The residual stream has the run's dtype, bfloat16, as the fused norm requires. If q and k have biases,
    torch computes them, in float32 until rope is done.
    """

    def __init__(self, library: Library, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.dtype, self.residual, self._library = spec, dtype, dtype, library
        self._experts = torch.arange(spec.experts, device=device)
        # One table of angles, torch's or FlashInfer's: for a million positions each takes half a gigabyte.
        if spec.qkv_bias:
            super().__init__(spec, dtype, device)
        else:
            self._cos_sin = torch.from_numpy(np.concatenate(rope_table(spec), axis=-1)).to(device)

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        if not len(x):
            return torch.empty_like(x)  # kernels cannot be launched on zero rows
        eps = self.spec.rms_eps
        if delta is None:
            normed: torch.Tensor = self._library.rmsnorm(x, weight, eps=eps)
            return normed
        self._library.fused_add_rmsnorm(delta, x, weight, eps=eps)
        return delta

    def rotation(self, positions: torch.Tensor) -> Any:
        return super().rotation(positions) if self.spec.qkv_bias else positions

    def qkv(
        self, projected: torch.Tensor, layer: HeadWeights, rotation: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if layer.qkv_bias is not None:
            return super().qkv(projected, layer, rotation)
        spec = self.spec
        heads = projected.view(len(projected), -1, spec.head_dim)
        q, k = heads[:, : spec.heads], heads[:, spec.heads : spec.heads + spec.kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._library.rmsnorm(q, layer.q_norm, eps=spec.rms_eps)
            k = self._library.rmsnorm(k, layer.k_norm, eps=spec.rms_eps)
        self._library.apply_rope_with_cos_sin_cache_inplace(
            positions=rotation,
            query=q.view(len(projected), -1),
            key=k.view(len(projected), -1),
            head_size=spec.head_dim,
            cos_sin_cache=self._cos_sin,
            is_neox=True,
        )
        return q, k, heads[:, spec.heads + spec.kv_heads :]

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._library.silu_and_mul(gate_up)
        return found

    def experts(
        self, x: torch.Tensor, layer: ExpertWeights, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor:
        if not len(x):
            return torch.empty_like(x)
        # Each token once for each of its experts, in the experts' order. Shapes depend on nothing that only the
        # GPU knows, so that the host need not wait and a graph can be captured.
        ordered, pairs = torch.sort(chosen.flatten(), stable=True)
        ends = torch.searchsorted(ordered, self._experts, right=True, out_int32=True)
        gate_up, down = (self._of_experts(one.values) for one in (layer.gate_up, layer.down))
        inner = self.swiglu(functional.grouped_mm(x[pairs // chosen.shape[1]], gate_up, offs=ends))
        made = functional.grouped_mm(inner, down, offs=ends)
        mixed = torch.empty_like(made).index_copy_(0, pairs, made).view(*chosen.shape, -1)
        return (mixed * weights[..., None]).sum(dim=1).to(x.dtype)

    def _of_experts(self, values: torch.Tensor) -> torch.Tensor:
        """The matrices of all experts, (experts, in, out), of (experts * out, in)."""
        return values.view(self.spec.experts, -1, values.shape[1]).transpose(1, 2)


def norms_as(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights with norm weights in ``dtype``, as FlashInfer's norms require; biases stay float32."""
    return {
        name: tensor.to(dtype) if tensor.dim() == 1 and not name.endswith("_bias") else tensor
        for name, tensor in weights.items()
    }
