"""Attention over paged KV: one interface, one backend per kind of device. ``cpu.py`` is the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from memserve.engine.plans import BatchPlan

if TYPE_CHECKING:
    import torch

Plan = TypeVar("Plan")


class AttentionBackend(Protocol[Plan]):
    """Attention that is planned once a batch and runs once a layer, on an arena that it does not own.

    The arena is ``(pages, layers, 2, kv_heads, page_tokens, head_dim)``, K before V. Tokens of a batch are
    numbered in the order of its rows; a row's tokens attend to their own and all earlier positions of the
    same row, in local layers to the last of them, and to nothing else.
    """

    def plan(self, batch: BatchPlan) -> Plan:
        """Prepare what all layers of a batch share: indices, masks, scratch."""

    def run(
        self, plan: Plan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Append K and V of the batch's tokens to their pages, then attend, writing the result to ``out``.

        q, out: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim), rotated already; all of the
        arena's dtype.
        """
