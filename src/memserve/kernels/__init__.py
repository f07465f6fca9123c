"""Attention over paged KV: one interface, one backend a kind of device. ``kernels/cpu.py`` is the definition of right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from memserve.engine.plans import BatchPlan

if TYPE_CHECKING:
    import torch

Plan = TypeVar("Plan")


class AttentionBackend(Protocol[Plan]):
    """Plans once a batch, runs once a layer. A backend owns no pages: it is given the arena it reads and writes.

    The arena is ``(pages, layers, 2, kv_heads, page_tokens, head_dim)``, K before V. Tokens of a batch are numbered
    in the order of its rows; a row's tokens attend to the row's own earlier positions and to nothing else.
    """

    def plan(self, batch: BatchPlan) -> Plan:
        """Everything of a batch that is the same for all layers: indices, masks, scratch."""

    def run(
        self, plan: Plan, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Append K and V of the batch's tokens to their pages, then attend.

        q, out: (tokens, heads, head_dim); k, v: (tokens, kv_heads, head_dim), rotated already; all of the arena's
        dtype. ``out`` is written.
        """
