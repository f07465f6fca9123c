"""Attention on a GPU with FlashInfer. The only module that imports flashinfer.

It is planned once a batch on the host, and runs once a layer. FlashInfer gets a layer's strided view of the
arena, ``arena[:, layer]``, and follows its strides (``kv_layout="HND"``). Every call names its optional
arguments, so that versions 0.6.9 to 0.7 all work.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch

from memserve.engine.plans import BatchPlan
from memserve.engine.spec import ModelSpec
from memserve.kernels.page_tables import Common, Ints, StepTables, Table
from memserve.kernels.sending import pinned, sent
from memserve.settings.gpu_room import workspace_bytes
from memserve.settings.gpus import gpu_environment

DECODE_GROUPS = (1, 2, 3, 4, 8)
"""Query heads per kv head that the CUDA-core decode kernel of 0.6.9 is built for."""
TENSOR_CORES_FROM = 4
"""Query heads per kv head from which decode runs on tensor cores: they hold up the reading of KV less."""
NAMED_SO = "0.6."
"""Version prefix for which :func:`libraries` knows the names; for others, a missing library is compiled."""
MERGED_VALUES = 8192
"""Query heads times head_dim that flashinfer's merge supports: 1,024 threads a row, 8 values each."""


class Library(Protocol):
    """The parts of flashinfer that are used."""

    BatchDecodeWithPagedKVCacheWrapper: Any
    BatchPrefillWithPagedKVCacheWrapper: Any
    append_paged_kv_cache: Any
    merge_state_in_place: Any
    rmsnorm: Any
    fused_add_rmsnorm: Any
    silu_and_mul: Any
    apply_rope_with_cos_sin_cache_inplace: Any


def load_flashinfer(capability: tuple[int, int], spec: ModelSpec) -> Library:
    """Import flashinfer for GPUs of this compute capability, so that no request waits for a compiler.

    The capability is set, so flashinfer need not detect it. If all kernels that the model needs were compiled
    ahead (``data/aot``), compiling is disabled.
    """
    arch = f"{capability[0]}.{capability[1]}" + ("a" if capability[0] >= 9 else "")
    for name, value in {**gpu_environment(), "FLASHINFER_CUDA_ARCH_LIST": arch}.items():
        # A worker has these from its supervisor; a test or a benchmark does not.
        os.environ.setdefault(name, value)
    if compiled_ahead(libraries(spec, prefill_backend(capability))):
        os.environ.setdefault("FLASHINFER_DISABLE_JIT", "1")
    import flashinfer

    library: Library = flashinfer
    return library


def libraries(spec: ModelSpec, backend: str) -> set[str]:
    """The names of flashinfer's libraries with a model's bfloat16 kernels. ``backend``: of prefill."""
    types = "with_kv_cache_dtype_q_bf16_dtype_kv_bf16_dtype_o_bf16_dtype_idx_i32"
    heads = f"head_dim_qk_{spec.head_dim}_head_dim_vo_{spec.head_dim}"
    plain = "posenc_0_use_swa_False_use_logits_cap_False"
    fa2 = f"batch_prefill_{types}_{heads}_{plain}_f16qk_False"
    # Decode on tensor cores is fa2's prefill kernel with one query a row.
    decode = (
        fa2 if with_tensor_cores(spec.heads // spec.kv_heads) else f"batch_decode_{types}_{heads}_{plain}"
    )
    prefill = f"{fa2}_sm90" if backend == "fa3" else fa2
    together = {fa2, "cascade"} if can_merge(spec.heads, spec.head_dim) else set()
    return {"page", "norm", "rope", "silu_and_mul", decode, prefill, *together}


def compiled_ahead(needed: set[str]) -> bool:
    """Whether the installed flashinfer includes all of these libraries, compiled ahead.

    False for 0.7, which has other names.
    """
    from importlib.metadata import version
    from importlib.util import find_spec

    if not version("flashinfer-python").startswith(NAMED_SO):
        return False
    spec = find_spec("flashinfer")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return needed <= {path.stem for folder in folders for path in Path(folder, "data", "aot").glob("*/*.so")}


def prefill_backend(capability: tuple[int, int]) -> str:
    """fa3 where its kernels run (Hopper), fa2 elsewhere.

    Never "auto", which may choose paths that misread strided pages.
    """
    return "fa3" if capability == (9, 0) else "fa2"


def with_tensor_cores(group: int) -> bool:
    """Whether decode with ``group`` query heads per kv head runs on tensor cores."""
    return group >= TENSOR_CORES_FROM or group not in DECODE_GROUPS


def can_merge(heads: int, head_dim: int) -> bool:
    """Whether a row's two results can be merged, so that rows may attend together to a shared prefix."""
    return heads * head_dim <= MERGED_VALUES


# ---- attention -----------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Append:
    """Where the batch's K and V are written, as arrays on the device."""

    batch_indices: torch.Tensor
    positions: torch.Tensor
    indices: torch.Tensor
    indptr: torch.Tensor
    last_page_len: torch.Tensor


@attrs.frozen(eq=False)
class Together:
    """The shared prefixes of a batch's first rows: a prefill of all their queries, without a mask."""

    rows: int
    prefill: Any
    out: torch.Tensor
    """(rows, heads, head_dim): their attention to the prefix."""
    weights: torch.Tensor
    """(rows, heads) float32: log2 of the sum of the exponentials in it."""
    rest: torch.Tensor
    """(decodes, heads) float32: the same logarithm for the rest of each decode row."""


@attrs.frozen(eq=False)
class FlashInferPlan:
    """A planned batch: which wrappers run, and on which tokens."""

    append: Append
    decodes: int
    """Number of decode tokens; they come first."""
    tokens: int
    decode: Any = None
    prefill: Any = None
    together: Together | None = None


@attrs.frozen(kw_only=True)
class Shape:
    """The dimensions of a model that a plan needs."""

    heads: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: torch.dtype

    def decode(self) -> dict[str, Any]:
        """Arguments of a decode wrapper's ``plan`` that all batches share."""
        return {
            "num_qo_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "page_size": self.page_tokens,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }

    def prefill(self, causal: bool = True) -> dict[str, Any]:
        """Arguments of a prefill wrapper's ``plan`` that all batches share.

        ``causal``: whether queries are a row's last positions, instead of coming after all keys.
        """
        given = self.decode()
        given["head_dim_qk"] = given.pop("head_dim")
        return given | {"causal": causal}


class FlashInferAttention:
    """Attention on the pages of one arena on one GPU; see :class:`~memserve.kernels.AttentionBackend`.

    It is full in every layer, so no row may be longer than the model's sliding window.

    :meth:`run` launches kernels and returns; the arena and a plan's arrays must live until they have run.
    """

    def __init__(
        self, library: Library, arena: torch.Tensor, heads: int, backend: str, most_rows: int = 1
    ) -> None:
        """``arena``: (pages, layers, 2, kv_heads, page_tokens, head_dim) on the GPU.

        ``backend``: of prefill, fa2 or fa3. ``most_rows``: of a captured batch, for the workspace's size.
        """
        self._library, self._arena = library, arena
        self.device = arena.device
        _, self._layers, _, kv_heads, page_tokens, head_dim = arena.shape
        self.shape = Shape(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, page_tokens=page_tokens, dtype=arena.dtype
        )
        self._tensor_cores = with_tensor_cores(heads // kv_heads)
        size = workspace_bytes(heads, kv_heads, head_dim, most_rows, _processors(self.device))
        self._workspace = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self._shared: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._decode = self._decode_wrapper()
        self._prefill = library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND", backend=backend)
        # fa2, which decode uses too, so that both return logarithms to the same base.
        self._common = library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND", backend="fa2")
        self.merges = can_merge(heads, head_dim)
        """Whether rows may attend together."""

    def _decode_wrapper(self, **graph: Any) -> Any:
        return self._library.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "HND", use_tensor_cores=self._tensor_cores, **graph
        )

    def plan(self, batch: BatchPlan) -> FlashInferPlan:
        """Plan any mix of rows; see :class:`~memserve.kernels.AttentionBackend`."""
        return self.plan_tables(StepTables.of(batch, self.shape.page_tokens))

    def plan_tables(self, tables: StepTables) -> FlashInferPlan:
        """A plan for any mix of rows, in the order of ``tables``."""
        everything = tables.all_rows
        there, here = partial(sent, device=self.device), partial(pinned, device=self.device)
        append = Append(
            there(tables.batch_indices), there(tables.positions), there(everything.indices),
            there(everything.indptr), there(everything.last_page_len),
        )  # fmt: skip
        decode = prefill = together = None
        if tables.decodes:
            # Host arrays, from pinned memory: FlashInfer would read device arrays back, which waits for the GPU.
            decode, rows = self._decode, tables.decode if tables.common is None else tables.common.rest
            decode.plan(
                indptr=here(rows.indptr),
                indices=there(rows.indices),
                last_page_len=here(rows.last_page_len),
                **self.shape.decode(),
            )
        if tables.common is not None:
            together = self._planned_together(tables.common, tables.decodes)
        if tables.decodes < len(tables.order):
            prefill = self._prefill
            self._plan_prefill(prefill, tables.qo_indptr, tables.chunks, causal=True)
        return FlashInferPlan(append, tables.decodes, len(tables.ids), decode, prefill, together)

    def _planned_together(self, common: Common, decodes: int) -> Together:
        assert self.merges, "rows with so many heads cannot be merged"
        self._plan_prefill(self._common, common.qo_indptr, common.pages, causal=False)
        heads, rows = self.shape.heads, common.rows
        out = torch.empty(rows, heads, self.shape.head_dim, dtype=self.shape.dtype, device=self.device)
        weights, rest = (
            torch.empty(many, heads, dtype=torch.float32, device=self.device) for many in (rows, decodes)
        )
        return Together(rows, self._common, out, weights, rest)

    def _plan_prefill(self, wrapper: Any, qo_indptr: Ints, table: Table, causal: bool) -> None:
        here = partial(pinned, device=self.device)
        wrapper.plan(
            qo_indptr=here(qo_indptr),
            paged_kv_indptr=here(table.indptr),
            paged_kv_indices=sent(table.indices, self.device),
            paged_kv_last_page_len=here(table.last_page_len),
            **self.shape.prefill(causal),
        )

    def captured(self, rows: int, most_pages: int) -> CapturedDecode:
        """Fixed arrays with their own wrapper for steps of ``rows`` decode rows.

        ``most_pages``: of all rows together.
        """
        return CapturedDecode(self, rows, most_pages)

    def shared_indices(self, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Arrays of ``most`` page numbers: on the device for kernels and for staging, and pinned on the host.

        All calls return the same arrays.
        """
        if self._shared is None:
            on_device = torch.zeros(2, most, dtype=torch.int32, device=self.device)
            self._shared = on_device[0], on_device[1], _pinned(most, self.device)
        assert len(self._shared[0]) >= most, "captured batches differ in how many pages they may have"
        return self._shared

    def run(
        self,
        plan: FlashInferPlan,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Launch append and attention of one layer; see :class:`~memserve.kernels.AttentionBackend`."""
        pages = self._arena[:, layer]  # (pages, 2, kv_heads, page_tokens, head_dim), strided
        to = plan.append
        self._library.append_paged_kv_cache(
            append_key=k,
            append_value=v,
            batch_indices=to.batch_indices,
            positions=to.positions,
            paged_kv_cache=pages,
            kv_indices=to.indices,
            kv_indptr=to.indptr,
            kv_last_page_len=to.last_page_len,
            kv_layout="HND",
        )
        if plan.together is not None:
            self._run_together(plan, plan.together, q[: plan.decodes], pages, out[: plan.decodes])
        elif plan.decode is not None:
            plan.decode.run(q[: plan.decodes], pages, out=out[: plan.decodes])
        if plan.prefill is not None:
            plan.prefill.run(q[plan.decodes : plan.tokens], pages, out=out[plan.decodes : plan.tokens])

    def _run_together(
        self,
        plan: FlashInferPlan,
        together: Together,
        q: torch.Tensor,
        pages: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Run decode rows: all on their own rest, the first ones also on their prefix, and merge both."""
        first = together.rows
        plan.decode.run(q, pages, out=out, lse=together.rest, return_lse=True)
        together.prefill.run(q[:first], pages, out=together.out, lse=together.weights, return_lse=True)
        self._library.merge_state_in_place(
            v=out[:first], s=together.rest[:first], v_other=together.out, s_other=together.weights
        )


class CapturedDecode:
    """Arrays at fixed addresses for one batch size, so that a CUDA graph that reads them can be replayed.

    :meth:`load` writes them in stream order, after the previous step has read them. It never waits for the
    GPU: its copies read pinned memory, which may be rewritten once they are done.
    """

    def __init__(self, attention: FlashInferAttention, rows: int, most_pages: int) -> None:
        self._attention, self.rows = attention, rows
        device = attention.device
        # One array of page numbers for all batch sizes: it can be large, and one step at a time is loaded.
        indices, self._staged, self._numbers = attention.shared_indices(most_pages)
        self._append = Append(
            torch.arange(rows, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
            indices,
            torch.zeros(rows + 1, dtype=torch.int32, device=device),
            torch.zeros(rows, dtype=torch.int32, device=device),
        )
        self.ids = torch.zeros(rows, dtype=torch.int32, device=device)
        """(rows,) int32: token ids."""
        self._host = [_pinned(size, device) for size in (rows + 1, rows, rows, rows)]
        # FlashInfer copies a plan's arrays into these very buffers, where append reads them too.
        self._wrapper = attention._decode_wrapper(
            use_cuda_graph=True,
            paged_kv_indptr_buffer=self._append.indptr,
            paged_kv_indices_buffer=self._append.indices,
            paged_kv_last_page_len_buffer=self._append.last_page_len,
        )
        self.plan = FlashInferPlan(self._append, rows, rows, self._wrapper, None)

    @property
    def positions(self) -> torch.Tensor:
        """(rows,) int32: positions of the tokens, for rope and append."""
        return self._append.positions

    def load(self, table: Table, positions: Ints) -> None:
        """Load the page tables and positions of a step, padded to ``rows`` rows."""
        indptr, last_page_len, at, _ = self._host
        used = len(table.indices)
        staged = self._staged[:used]
        staged.copy_(_filled(self._numbers, table.indices), non_blocking=True)
        # Page numbers on the host would make FlashInfer wait for the GPU; the other arrays do not.
        self._wrapper.plan(
            indptr=_filled(indptr, table.indptr),
            indices=staged,
            last_page_len=_filled(last_page_len, table.last_page_len),
            **self._attention.shape.decode(),
        )
        self._append.positions.copy_(_filled(at, positions), non_blocking=True)

    def load_ids(self, ids: Ints) -> None:
        """Load the token ids of a step, padded to ``rows`` rows."""
        self.ids.copy_(_filled(self._host[3], ids), non_blocking=True)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _pinned(size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.int32, pin_memory=device.type != "cpu")


def _filled(buffer: torch.Tensor, values: Ints) -> torch.Tensor:
    """Fill the start of a host buffer with ``values``; the filled part."""
    part = buffer[: len(values)]
    part.numpy()[:] = values
    return part
