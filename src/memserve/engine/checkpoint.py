"""A published model, opened: a GGUF file or a Hugging Face directory, treated alike from here on."""

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
    """An open checkpoint."""

    path: Path
    spec: ModelSpec
    tensors: dict[str, TensorInfo]
    data: Callable[[TensorInfo], memoryview]
    """A tensor's bytes as stored in the file; valid while the checkpoint is open."""
    sources: dict[str, tuple[str, ...]]
    """The names of the tensors that each of the engine's weights is concatenated from."""
    interleaved_suffixes: tuple[str, ...]
    """Suffixes of the names of tensors whose rows interleave the two rope halves of a head."""
    ignored_suffixes: tuple[str, ...]
    """Suffixes of the names of tensors that are ignored, because they are not weights of the engine."""
    tokenizer: Path | dict[str, Any]
    """The path of a tokenizer.json, or the GGUF metadata to build one from."""


def read_spec(path: str | Path) -> ModelSpec:
    """The spec of a GGUF file or a Hugging Face directory, from headers alone.

    Raises UserError if it is unusable.
    """
    with open_checkpoint(Path(path)) as checkpoint:
        return checkpoint.spec


def checkpoint_files(path: Path) -> list[Path]:
    """Every file that the model's conversion depends on.

    Raises UserError naming the files that a directory lacks.
    """
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
        tensors=_each_experts(file.tensors),
        data=file.data,
        sources=family.sources("gguf", spec.layers, spec.tied_embeddings, spec.experts),
        interleaved_suffixes=family.gguf_interleaved,
        ignored_suffixes=(ROPE_FACTORS,),  # the spec has them
        tokenizer=file.metadata,
    )


def _each_experts(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """``tensors``, those of all experts cut into one matrix for each: ``NAME.{number}``."""
    found = {}
    for name, tensor in tensors.items():
        if len(tensor.shape) < 3:
            found[name] = tensor
            continue
        size = tensor.nbytes // tensor.shape[0]  # whole rows, and so whole blocks
        for expert in range(tensor.shape[0]):
            one = f"{name}.{expert}"
            offset = tensor.offset + expert * size
            found[one] = attrs.evolve(tensor, name=one, shape=tensor.shape[1:], offset=offset, nbytes=size)
    return found


def _of_folder(path: Path, weights: Safetensors) -> Checkpoint:
    spec = hf_spec(path, weights)
    family = family_named(spec.architecture)
    # Old checkpoints hold a table that rope computes anyway, and some store the tied head a second time.
    ignored_suffixes = ("rotary_emb.inv_freq", *(family.tables["head"].hf if spec.tied_embeddings else ()))
    return Checkpoint(
        path=path,
        spec=spec,
        tensors=weights.tensors,
        data=weights.data,
        sources=family.sources("hf", spec.layers, spec.tied_embeddings, spec.experts),
        interleaved_suffixes=(),
        ignored_suffixes=ignored_suffixes,
        tokenizer=path / "tokenizer.json",
    )
