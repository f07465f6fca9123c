"""The demo model on real text: how near the native step is to float32. bench/quality.py measures more of this."""

from __future__ import annotations

import pytest
import torch

from memserve.engine.spec import find_model
from memserve.engine.weights import prepare
from quality import compare, documents, native_logits, torch_logits
from test_model import DEMO

POSITIONS = 1000


def test_the_native_step_is_as_near_to_float32_as_torch() -> None:
    """The native step in bfloat16 is about as near to float32 as torch in bfloat16."""
    exact, rounded = prepare(find_model(DEMO), "float32"), prepare(find_model(DEMO), "bfloat16")
    native = native_logits(rounded, threads=2)
    if native is None:
        pytest.skip("no native step here: see the log")
    ways = {
        "float32": torch_logits(exact, torch.float32),
        "torch": torch_logits(rounded, torch.bfloat16),
        "native": native,
    }
    found = compare(ways, documents(exact.tokenizer, ("types",), POSITIONS))

    figures = {name: quality.figures for name, quality in found.items()}
    assert found["native"].positions == POSITIONS
    assert figures["float32"]["argmax"] == 1 and figures["float32"]["rms"] == 0
    assert figures["native"]["argmax"] >= 0.98, figures
    assert figures["native"]["rms"] <= 1.5 * figures["torch"]["rms"], figures
    assert figures["native"]["max"] <= 1.5 * figures["torch"]["max"], figures
