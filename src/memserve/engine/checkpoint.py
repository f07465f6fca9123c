"""A model as it was published, opened: a GGUF file or a Hugging Face directory, and no difference from here on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from memserve.engine.families import family_named
from memserve.engine.gguf import Gguf, TensorInfo, read_gguf
from memserve.engine.gguf_spec import ROPE_FACTORS, gguf_spec
from memserve.engine.hf import hf_spec, model_files, weight_files
from memserve.engine.safetensors import Safetensors
from memserve.engine.spec import ModelSpec


@attrs.frozen
class Checkpoint:
    """An open model."""

    path: Path
    spec: ModelSpec
    tensors: dict[str, TensorInfo]
    data: Callable[[TensorInfo], memoryview]
    """A tensor's bytes as they are in the file; valid while the checkpoint is open."""
    sources: dict[str, tuple[str, ...]]
    """The tensors that each weight of the engine is concatenated from."""
    interleaved: tuple[str, ...]
    """Ends of the names of tensors whose rows have rope's pairs side by side."""
    passed_over: tuple[str, ...]
    """Ends of the names of tensors that are no weights."""
    tokenizer: Path | dict[str, Any]
    """A tokenizer.json, or the GGUF metadata to build one from."""


def read_spec(path: str | Path) -> ModelSpec:
    """The spec of a GGUF file or a Hugging Face directory, from headers alone. Raises UserError when it is not usable."""
    with open_checkpoint(Path(path)) as checkpoint:
        return checkpoint.spec


def checkpoint_files(path: Path) -> list[Path]:
    """Every file that the model's conversion depends on. Raises UserError naming what a directory lacks."""
    return model_files(path) if path.is_dir() else [path]


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open a GGUF file or a Hugging Face directory. Raises UserError when it cannot be used."""
    if not path.is_dir():
        with read_gguf(path) as file:
            yield _of_gguf(file)
        return
    weights = Safetensors.open(weight_files(path))
    try:
        yield _of_folder(path, weights)
    finally:
        weights.close()


def _of_gguf(file: Gguf) -> Checkpoint:
    spec = gguf_spec(file)
    family = family_named(spec.architecture)
    return Checkpoint(
        path=file.path,
        spec=spec,
        tensors=file.tensors,
        data=file.data,
        sources=family.sources("gguf", spec.layers, spec.tied_embeddings),
        interleaved=family.gguf_interleaved,
        passed_over=(ROPE_FACTORS,),  # in the spec
        tokenizer=file.metadata,
    )


def _of_folder(path: Path, weights: Safetensors) -> Checkpoint:
    spec = hf_spec(path, weights)
    family = family_named(spec.architecture)
    # Old checkpoints hold a table that rope computes, and some the tied head once more.
    passed_over = ("rotary_emb.inv_freq", *(family.tables["head"].hf if spec.tied_embeddings else ()))
    return Checkpoint(
        path=path,
        spec=spec,
        tensors=weights.tensors,
        data=weights.data,
        sources=family.sources("hf", spec.layers, spec.tied_embeddings),
        interleaved=(),
        passed_over=passed_over,
        tokenizer=path / "tokenizer.json",
    )
