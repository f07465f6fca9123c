"""The FlashInfer calls that memserve makes, computed with torch on the CPU from the same arrays and strides.

It is as strict as FlashInfer's C++ side: it checks types, shapes, strides and alignment. A graph in
:class:`Replays` runs its Python function again on the same tensors, so everything that a captured step reads
must be at a fixed address.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


class Replays:
    """Stands for CUDA graphs and events: a replay runs the captured function again."""

    def __init__(self) -> None:
        self.captured = 0
        self.log: list[str] = []
        """Launches and waits, in order, as ``replay`` and ``wait``."""

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run ``run`` twice, as a capture with a warm-up does; the function that replays it."""
        self.captured += 1
        run()
        run()

        def replay() -> None:
            self.log.append("replay")
            run()

        return replay

    def mark(self) -> Replays:
        """A mark whose waits are only logged."""
        return self

    def wait(self) -> None:
        """Of a mark: nothing is launched that is not done."""
        self.log.append("wait")

    def reached(self) -> bool:
        """Of a mark."""
        return True


def _ints(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert tensor.dtype == torch.int32 and tensor.dim() == 1 and tensor.is_contiguous()


def _halves(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a layer's view, each (pages, kv_heads, page_tokens, head_dim).

    They must have equal strides, the last one 1, as the kernels require, and be aligned to 16 bytes.
    """
    assert cache.dim() == 5 and cache.shape[1] == 2
    k, v = cache.unbind(1)
    assert k.stride() == v.stride() and k.stride(-1) == 1
    assert k.data_ptr() % 16 == 0 and all(step * k.element_size() % 16 == 0 for step in k.stride()[:3])
    return k, v


class _Attention:
    """The common part of both wrappers: planned page tables, and attention over them."""

    causal = False
    heads: tuple[int, int, int]

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "HND"
        self.device, self.room = float_workspace_buffer.device, len(float_workspace_buffer)
        self.tables: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def _attend(
        self, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, qo: list[int]
    ) -> None:
        """Attend; ``lse`` receives log2 of each query's sum of exponentials, its weight in merges."""
        assert self.tables is not None, "run before plan"
        k, v = _halves(cache)
        indptr, indices, last = (table.tolist() for table in self.tables)
        assert q.dtype == self.dtype == k.dtype == out.dtype and q.stride(-1) == 1
        assert q.shape == out.shape == (len(q), *self.heads[:1], self.heads[2])
        group = self.heads[0] // self.heads[1]
        for row in range(len(last)):
            pages = indices[indptr[row] : indptr[row + 1]]
            assert 1 <= last[row] <= self.page_size and pages
            length = (len(pages) - 1) * self.page_size + last[row]
            # (kv_heads, length, head_dim): slots after the last token are never read.
            keys, values = (
                half[pages].transpose(0, 1).reshape(self.heads[1], -1, self.heads[2])[:, :length].double()
                for half in (k, v)
            )
            queries = q[qo[row] : qo[row + 1]].transpose(0, 1).double()
            scores = queries @ keys.repeat_interleave(group, 0).transpose(1, 2) * self.heads[2] ** -0.5
            if self.causal:
                seen = length - queries.shape[1] + torch.arange(queries.shape[1])[:, None]
                scores.masked_fill_(torch.arange(length) > seen, float("-inf"))  # aligned to the end
            lse[qo[row] : qo[row + 1]] = scores.logsumexp(-1).T / math.log(2)
            found = scores.softmax(-1) @ values.repeat_interleave(group, 0)
            out[qo[row] : qo[row + 1]] = found.transpose(0, 1).to(out.dtype)

    def _split(self, tiles: int, tile: int) -> None:
        """Check that the workspace holds the parts of a split context.

        They are values and their weights in float32, each array aligned to 16 bytes.
        """
        heads, _, head_dim = self.heads
        taken = heads * tiles * tile * head_dim * 4 + 16 + heads * tiles * tile * 4
        assert taken <= self.room, f"Buffer overflow: {taken} bytes of parts, {self.room} of workspace"

    def _run(
        self, q: torch.Tensor, cache: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None,
        return_lse: bool, qo: list[int],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if len(q) != qo[-1]:
            raise ValueError(f"q.shape[0] ({len(q)}) does not match {qo[-1]}")
        out, weights = torch.zeros_like(q) if out is None else out, torch.empty(q.shape[:2])
        if return_lse and lse is not None:
            if lse.shape != q.shape[:2] or lse.dtype != torch.float32:
                raise ValueError(f"Invalid lse: {lse.shape}, {lse.dtype}")
            weights = lse
        self._attend(q, cache, out, weights, qo)
        return (out, weights) if return_lse else out

    def _planned(self, heads: tuple[int, int, int], page_size: int, q_type: Any, kv_type: Any) -> None:
        assert q_type == kv_type
        self.heads, self.page_size, self.dtype = heads, page_size, q_type


class BatchDecodeWithPagedKVCacheWrapper(_Attention):
    """Attention with one query per row."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False, paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None, paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)
        self.tensor_cores = use_tensor_cores
        buffers = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        self.fixed = [one for one in buffers if one is not None] if use_cuda_graph else None
        assert self.fixed is None or len(self.fixed[0]) == len(self.fixed[2]) + 1

    def plan(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, q_data_type: Any, kv_data_type: Any,
    ) -> None:  # fmt: skip
        """Store the page tables, in the fixed buffers if there are any."""
        _ints(indptr, indices, last_page_len)
        group = num_qo_heads // num_kv_heads
        assert self.tensor_cores or group in (1, 2, 3, 4, 8), "Unsupported group_size"
        self._planned((num_qo_heads, num_kv_heads, head_dim), page_size, q_data_type, kv_data_type)
        if self.fixed is None:
            self.tables = indptr.clone(), indices.clone(), last_page_len.clone()
            return
        assert len(last_page_len) == len(self.fixed[2]), "the batch size is fixed"
        if self.tensor_cores:
            tile = 16 if group <= 16 else 64
            self._split(-(-len(last_page_len) * group // tile) + len(last_page_len) - 1, tile)
        self.fixed[0].copy_(indptr)
        self.fixed[1][: len(indices)].copy_(indices)
        self.fixed[2].copy_(last_page_len)
        self.tables = self.fixed[0], self.fixed[1], self.fixed[2]

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None, return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Attend."""
        assert self.tables is not None, "run before plan"
        return self._run(q, paged_kv_cache, out, lse, return_lse, list(range(len(self.tables[2]) + 1)))


class BatchPrefillWithPagedKVCacheWrapper(_Attention):
    """Attention with several queries per row; causal, or each query sees all keys."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", backend: str = "auto"
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)
        assert backend in ("fa2", "fa3")

    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        page_size: int, causal: bool = False, *, q_data_type: Any, kv_data_type: Any,
    ) -> None:  # fmt: skip
        """Store the page tables."""
        _ints(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert int(qo_indptr[0]) == 0 and len(qo_indptr) == len(paged_kv_indptr)
        self.causal, self.qo = causal, qo_indptr.tolist()
        self.tables = paged_kv_indptr.clone(), paged_kv_indices.clone(), paged_kv_last_page_len.clone()
        self._planned((num_qo_heads, num_kv_heads, head_dim_qk), page_size, q_data_type, kv_data_type)

    def run(
        self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None, return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Attend."""
        return self._run(q, paged_kv_cache, out, lse, return_lse, self.qo)


def merge_state_in_place(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Set ``v`` and ``s`` to the attention over both parts; rows with a false ``mask`` keep their values."""
    assert all(one.is_contiguous() for one in (v, s, v_other, s_other))
    assert v.dim() == 3 and v.shape == v_other.shape and s.shape == s_other.shape == v.shape[:2]
    assert v.dtype == v_other.dtype and s.dtype == s_other.dtype == torch.float32
    assert v.shape[1] * v.shape[2] // 8 <= 1024, "MergeStateInPlace kernel launch failed: one block a row"
    assert mask is None or mask.shape == (len(v),)
    both = torch.stack((s, s_other)).double() * math.log(2)
    share = both.softmax(0)[..., None]
    merged = (share[0] * v.double() + share[1] * v_other.double()).to(v.dtype)
    chosen = torch.ones(len(v), dtype=torch.bool) if mask is None else mask.bool()
    v[chosen], s[chosen] = merged[chosen], (both.logsumexp(0) / math.log(2)).float()[chosen]


def append_paged_kv_cache(
    append_key: torch.Tensor, append_value: torch.Tensor, batch_indices: torch.Tensor, positions: torch.Tensor,
    paged_kv_cache: torch.Tensor, kv_indices: torch.Tensor, kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:  # fmt: skip
    """Write each token's K and V to its row's page."""
    assert kv_layout == "HND"
    _ints(batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    k, v = _halves(paged_kv_cache)
    assert append_key.stride(-1) == append_value.stride(-1) == 1 and append_key.dtype == k.dtype
    assert len(append_key) == len(append_value) == len(batch_indices) == len(positions)
    page_size, rows, at = k.shape[2], batch_indices.long(), positions.long()
    first, last = kv_indptr.long()[rows], kv_indptr.long()[rows + 1]
    assert bool((at < (last - first - 1) * page_size + kv_last_page_len[rows]).all())
    pages = kv_indices.long()[first + at // page_size]
    k[pages, :, at % page_size] = append_key
    v[pages, :, at % page_size] = append_value


def rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The norm of (tokens, hidden) or (tokens, heads, head_dim)."""
    assert input.dim() in (2, 3) and len(input) and weight.dtype == input.dtype and input.stride(-1) == 1
    x = input.float()
    return (x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.float()).to(input.dtype)


def fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> None:
    """Compute residual += input, then input = norm(residual)."""
    assert input.dim() == residual.dim() == 2 and input.dtype == residual.dtype
    total = input.float() + residual.float()
    residual.copy_(total)
    normed = total * (total.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
    input.copy_(normed)


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:
    """silu of the first half times the second half."""
    assert input.is_contiguous() and input.shape[-1] // 2 * input.element_size() % 16 == 0
    gate, up = input.float().chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, head_size: int, cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:  # fmt: skip
    """Rotate q and k in place."""
    _ints(positions)
    assert cos_sin_cache.dtype == torch.float32 and is_neox
    cosines, sines = cos_sin_cache[positions.long()].chunk(2, -1)
    for tensor in (query, key):
        heads = tensor.view(len(tensor), -1, head_size)
        first, second = heads.float().chunk(2, -1)
        c, s = cosines[:, None], sines[:, None]
        heads.copy_(torch.cat((first * c - second * s, second * c + first * s), -1))
