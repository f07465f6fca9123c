"""Plays a machine with GPUs in every process that has this folder in PYTHONPATH; GPU memory lies in files.

``cupy`` here keeps what a process allocates in a file of its own, so that other processes can open handles to it, as
with CUDA. ``bin/nvidia-smi`` lists the cards. FlashInfer's calls are computed by torch on the CPU, or by FlashInfer's
own kernels on the CPU (``gpu_rehearsal``) if the environment asks for that. Everything else is the program's own code.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

REHEARSED = os.environ.get("PLAYED_GPU_LIBRARY") == "flashinfer"


def change_gpus(gpus: Any) -> None:
    """Accept a torch without CUDA: nothing of its CUDA is called."""
    real = gpus.missing_packages

    def missing() -> str | None:
        found: str | None = real()
        return None if found and found.startswith("torch was built without CUDA") else found

    gpus.missing_packages = missing


def change_engine(engine: Any) -> None:
    """Replace what the engine asks of torch's CUDA, its graphs and FlashInfer."""
    import torch

    properties = SimpleNamespace(total_memory=8 << 30, multi_processor_count=132)
    answers = {
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "get_device_name": "played",
    }
    for name in ("init", "set_device", "set_per_process_memory_fraction"):
        answers[name] = None
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *given, answer=answer: answer)
    if REHEARSED:
        import gpu_rehearsal

        gpu_rehearsal.take_over(engine)
        return
    import fake_flashinfer

    engine.CudaGraphs = lambda device: fake_flashinfer.Replays()
    engine.load_flashinfer = lambda capability, spec: fake_flashinfer


CHANGES: dict[str, Callable[[Any], None]] = {
    "memserve.settings.gpus": change_gpus,
    "memserve.engine.cuda": change_engine,
}


class Changed(importlib.abc.MetaPathFinder):
    """Finds the modules of ``CHANGES`` as usual, and changes each right after it was imported."""

    def find_spec(
        self, name: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See the protocol."""
        if name not in CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader, run = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                CHANGES[name](module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Changed())
