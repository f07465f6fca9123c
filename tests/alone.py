"""The demo model's answers by one engine in this process: what a cluster must say, to the bit, in bfloat16.

The native step is deterministic: the bits of a row depend on its sequence alone. So nothing that a cluster does
may change a token, and the reference runs every prompt alone and in one piece.
"""

from __future__ import annotations

import mmap

from adjustments import past_of
from memserve.drawing import Sampling
from memserve.engine.plans import BatchPlan, Row
from memserve.engine.runner import CpuEngine
from memserve.engine.spec import find_model
from memserve.engine.weights import prepare
from memserve.tokens import pack
from test_model import DEMO, GREEDY

PAGES, PAGE_TOKENS = 64, 16


class Alone:
    """One engine in this process, which runs every prompt alone and in one piece."""

    def __init__(self) -> None:
        files = prepare(find_model(DEMO), "bfloat16")
        arena = mmap.mmap(-1, PAGES * files.spec.page_bytes(PAGE_TOKENS, "bfloat16"))
        self._engine = CpuEngine(files.spec, files.weights, arena, PAGES, PAGE_TOKENS, "bfloat16", threads=2)

    def tokens(
        self, ids: list[int], new: int, how: Sampling = GREEDY, ends: tuple[int, ...] = ()
    ) -> list[int]:
        """Tokens, greedy unless ``how`` says otherwise, up to one of ``ends``."""
        text, start = list(ids), 0
        while len(text) < len(ids) + new and (len(text) == len(ids) or text[-1] not in ends):
            past = past_of(how, text, len(ids), ends)
            row = Row(pack(text[start:]), start, tuple(range(PAGES)), how, past)
            start = len(text)
            text += [token for token in self._engine.run(BatchPlan((row,))).tokens if token is not None]
        return text[len(ids) :]
