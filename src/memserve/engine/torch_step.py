"""A step of the CPU engine in torch, for models and machines without the native step."""

from __future__ import annotations

from functools import partial

import torch

from memserve.drawing import Logprobs, PromptLogprobs
from memserve.engine import sampling
from memserve.engine.adjusting import adjusted, logprobs_of_draws
from memserve.engine.model import BatchTensors, Llama
from memserve.engine.plans import BatchPlan
from memserve.engine.prompt_logprobs import score_prompts
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import Bits, in_rows, tensors_of
from memserve.kernels.cpu import attention_of
from memserve.kernels.native import ArenaPages
from memserve.kernels.native.prompt_logprobs import SCORED_AT_ONCE
from memserve.tokens import pack


class TorchStep:
    """The model in torch, on pages in host memory."""

    def __init__(self, spec: ModelSpec, weights: Bits, dtype: str) -> None:
        """``weights``: matrices as rows, or in tiles, which are copied to rows. ``dtype``: of the run."""
        self._spec, self._dtype = spec, getattr(torch, dtype)
        self._model = Llama(spec, tensors_of(in_rows(weights, spec)), self._dtype)

    def step(
        self, plan: BatchPlan, pages: ArenaPages, threads: int
    ) -> tuple[list[bytes], list[Logprobs | None], dict[int, PromptLogprobs]]:
        """One draw and its report per sampled row, drafts ignored; prompt log probabilities by row number."""
        torch.set_num_threads(threads)
        attention = attention_of(self._spec, torch.from_numpy(pages.memory).view(self._dtype))
        rows = [row for row in plan.rows if row.sample is not None]
        settings = [row.sample for row in rows if row.sample is not None]
        with torch.inference_mode():
            batch = BatchTensors.of(plan)
            x, delta = self._model.layers(batch, attention.plan(plan), attention)
            head = partial(self._model.head, x, delta)
            prompts = score_prompts(enumerate(plan.rows), head, x.device, SCORED_AT_ONCE)
            if not rows:
                return [], [], prompts
            logits = head(batch.wanted)
            tokens = sampling.draw(adjusted(logits, rows), settings, [row.end for row in rows])
            return [pack([one]) for one in tokens], logprobs_of_draws(logits, rows, tokens), prompts
