"""Conversion of weights: what the cached file holds, and that it is made once."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from memserve.engine import weights as under_test
from memserve.engine.checkpoint import read_spec
from memserve.engine.convert import SCALE, weight_shapes
from memserve.engine.spec import find_model
from memserve.engine.weights import (
    in_rows,
    in_tiles,
    map_bits,
    map_weights,
    prepare,
    random_weights,
    save_weights,
)
from memserve.errors import UserError
from test_gguf import DEMO, LLAMA, write_gguf

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|endoftext|>", "a", "b", "ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}


def _tensors(tied: bool) -> dict[str, np.ndarray]:
    """GGUF tensors of the tiny Llama in ``LLAMA``: hidden 64, 4 heads, 2 kv heads, 2 layers, vocabulary 4."""
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (4, 64), "output_norm.weight": (64,)}
    for layer in range(2):
        block = f"blk.{layer}."
        shapes |= {
            block + "attn_norm.weight": (64,),
            block + "attn_q.weight": (64, 64),
            block + "attn_k.weight": (32, 64),
            block + "attn_v.weight": (32, 64),
            block + "attn_output.weight": (64, 64),
            block + "ffn_norm.weight": (64,),
            block + "ffn_gate.weight": (96, 64),
            block + "ffn_up.weight": (96, 64),
            block + "ffn_down.weight": (64, 96),
        }
    if not tied:
        shapes["output.weight"] = (4, 64)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    raw = {name: ("F32", value.shape, value.tobytes()) for name, value in tensors.items()}
    return write_gguf(path, LLAMA | TOKENIZER, raw)


@pytest.mark.parametrize("tied", [True, False])
def test_converted_tensors_are_the_files(tmp_path: Path, tied: bool) -> None:
    """Converted tensors are those of the file, joined and permuted as the model needs them."""
    source = _tensors(tied)
    files = prepare(_write(tmp_path / "tiny.gguf", source), "float32", tmp_path / "cache")
    found = map_weights(files.weights)

    assert files.spec.name == "tiny"
    assert files.spec.tied_embeddings is tied
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == weight_shapes(files.spec)
    q = source["blk.1.attn_q.weight"].reshape(4, 8, 2, 64).swapaxes(1, 2).reshape(64, 64)
    k = source["blk.1.attn_k.weight"].reshape(2, 8, 2, 64).swapaxes(1, 2).reshape(32, 64)
    assert np.array_equal(found["1.qkv"].numpy(), np.concatenate([q, k, source["blk.1.attn_v.weight"]]))
    gate_up = np.concatenate([source["blk.0.ffn_gate.weight"], source["blk.0.ffn_up.weight"]])
    assert np.array_equal(found["0.gate_up"].numpy(), gate_up)
    assert np.array_equal(found["embed"].numpy(), source["token_embd.weight"])
    assert ("head" in found) is not tied


def test_bfloat16_equals_torchs_rounding(tmp_path: Path) -> None:
    """Conversion rounds to bfloat16 as torch does, and keeps norms in float32."""
    source = _tensors(True)
    path = _write(tmp_path / "tiny.gguf", source)
    found = map_weights(prepare(path, "bfloat16", tmp_path / "cache").weights)

    assert torch.equal(found["embed"], torch.from_numpy(source["token_embd.weight"]).bfloat16())
    assert found["norm"].dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_int8_is_the_nearest(tmp_path: Path, tied: bool) -> None:
    """int8 weights are the nearest to the exact ones, with one scale per row."""
    source = _tensors(tied)
    source["blk.0.ffn_down.weight"][3] = 0
    source["blk.1.attn_v.weight"][5] *= 1000
    path = _write(tmp_path / "tiny.gguf", source)
    exact, found = (
        map_weights(prepare(path, stored, tmp_path / "cache").weights) for stored in ("float32", "int8")
    )
    matrices = {name for name, tensor in exact.items() if tensor.ndim == 2}
    assert found.keys() == exact.keys() | {name + SCALE for name in matrices}
    assert all(torch.equal(found[name], exact[name]) for name in exact.keys() - matrices)
    for name in matrices:
        values, scale = found[name], found[name + SCALE]
        assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
        assert torch.equal(scale, scale.bfloat16().float())  # torch multiplies by bfloat16
        step = exact[name].abs().amax(1) / 127
        assert torch.allclose(scale, step, rtol=2**-8, atol=0)
        assert int(values.abs().max()) == 127
        # Nearest: at most half a step off, where bfloat16's scale does not clip the greatest of a row.
        error = (values.float() * scale[:, None] - exact[name]).abs()
        assert bool((error <= 0.5001 * scale[:, None]).all()), name


def test_int8_of_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    """Weights that are not finite cannot be stored as int8 and are refused."""
    source = _tensors(True)
    source["blk.1.ffn_up.weight"][7, 7] = np.nan
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight.*not finite.*model\.weights"):
        prepare(_write(tmp_path / "tiny.gguf", source), "int8", tmp_path / "cache")


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_the_file_is_safetensors_and_aligned(tmp_path: Path, stored: str) -> None:
    """The converted file is valid safetensors, and its tensors are aligned."""
    files = prepare(_write(tmp_path / "tiny.gguf", _tensors(True)), stored, tmp_path / "cache")

    with safe_open(files.weights, "pt") as file:
        names = set(file.keys())
    named = {name.removesuffix(SCALE) for name in names if not name.startswith("_")}
    assert named == set(weight_shapes(files.spec))
    assert all(
        tensor.data_ptr() % under_test.ALIGNMENT == 0 for tensor in map_weights(files.weights).values()
    )


def test_a_second_call_converts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was converted before, also under another name, is not converted again."""
    path = _write(tmp_path / "tiny.gguf", _tensors(True))
    first = prepare(path, "float32", tmp_path / "cache")
    monkeypatch.setattr(under_test, "_convert", lambda *_: pytest.fail("converted again"))
    copy = tmp_path / "other.gguf"
    copy.write_bytes(path.read_bytes())

    assert prepare(path, "float32", tmp_path / "cache") == first
    assert prepare(copy, "float32", tmp_path / "cache").weights == first.weights
    assert prepare(copy, "float32", tmp_path / "cache").spec.name == "other"


def test_a_damaged_conversion_is_made_again(tmp_path: Path) -> None:
    """A damaged converted file is replaced."""
    path = _write(tmp_path / "tiny.gguf", _tensors(True))
    files = prepare(path, "float32", tmp_path / "cache")
    whole = files.weights.read_bytes()
    for damaged in (whole[:-64], b"", whole[:4] + b"\xff" * 60):
        files.weights.write_bytes(damaged)
        assert prepare(path, "float32", tmp_path / "cache").weights.read_bytes() == whole


def test_two_processes_convert_once(tmp_path: Path) -> None:
    """Two processes that start together convert a model once."""
    path = _write(tmp_path / "tiny.gguf", _tensors(True))
    code = "import sys; from memserve.engine.weights import prepare; from pathlib import Path\n"
    code += "print(prepare(sys.argv[1], 'float32', Path(sys.argv[2])).weights.stat().st_ino)"
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    inodes = [process.communicate(timeout=60)[0].strip() for process in both]

    assert inodes[0] == inodes[1] != ""


def test_foreign_and_missing_tensors_are_named(tmp_path: Path) -> None:
    """Tensors that are missing, or that the model does not have, are named and refused."""
    tensors = _tensors(True)
    extra = tensors | {"blk.0.attn_q.bias": np.zeros(64, np.float32)}
    with pytest.raises(UserError, match=r"blk\.0\.attn_q\.bias"):
        prepare(_write(tmp_path / "a.gguf", extra), "float32", tmp_path / "cache")
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(UserError, match=r"missing: blk\.1\.ffn_up\.weight"):
        prepare(_write(tmp_path / "b.gguf", tensors), "float32", tmp_path / "cache")
    assert not list((tmp_path / "cache" / "models").glob("*/weights.safetensors"))


def test_an_unwritable_cache_is_a_user_error(tmp_path: Path) -> None:
    """A cache that cannot be written is a user error that names MEMSERVE_CACHE."""
    path = _write(tmp_path / "tiny.gguf", _tensors(True))
    (tmp_path / "cache").write_text("a file, not a folder")

    with pytest.raises(UserError, match="MEMSERVE_CACHE"):
        prepare(path, "float32", tmp_path / "cache")


def test_a_conversion_in_a_cache_that_is_read_only_serves(tmp_path: Path) -> None:
    """In an image that brings its cache along, the model's file has another inode than when it was converted."""
    path = _write(tmp_path / "tiny.gguf", _tensors(True))
    files = prepare(path, "float32", tmp_path / "cache")
    (tmp_path / "cache" / "seen").rename(tmp_path / "elsewhere")
    (tmp_path / "cache" / "seen").write_text(
        "a file, in which nothing can be written, as in a read-only folder"
    )

    assert prepare(path, "float32", tmp_path / "cache") == files


def test_a_conversion_that_failed_leaves_the_disk_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half of a model that filled the disk would stay there, and the disk full."""

    def fills_the_disk(weights: object, path: Path) -> None:
        path.write_bytes(b"half of the weights")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = _write(tmp_path / "tiny.gguf", _tensors(True))
    monkeypatch.setattr(under_test, "_write_safetensors", fills_the_disk)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(path, "float32", tmp_path / "cache")

    assert not [one for one in (tmp_path / "cache" / "models").iterdir() if one.is_dir()]


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_written_weights_come_back(tmp_path: Path, stored: str) -> None:
    """Saved weights read back as they were."""
    spec = read_spec(_write(tmp_path / "tiny.gguf", _tensors(False)))
    weights = random_weights(spec, stored, 3)
    save_weights(weights, tmp_path / "w")
    found = map_weights(tmp_path / "w")

    assert weights.keys() == found.keys()
    assert all(torch.equal(weights[name], found[name]) for name in weights)


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_the_demo_model_converts_without_torch(tmp_path: Path, stored: str) -> None:
    """The demo model converts without torch and within 450 MiB."""
    code = """if True:
        import sys
        from pathlib import Path
        from memserve.engine.weights import prepare
        prepare(sys.argv[1], sys.argv[3], Path(sys.argv[2]))
        assert "torch" not in sys.modules
        status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's, from before exec
        peak_mib = int(status.split("VmHWM:")[1].split()[0]) / 1024
        assert peak_mib < 450, peak_mib
    """
    subprocess.run(
        [sys.executable, "-c", code, str(find_model(DEMO)), str(tmp_path), stored], check=True, timeout=120
    )


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_tiles_hold_the_rows(tmp_path: Path, stored: str) -> None:
    """Weights stored in tiles have the values of those in rows, each in its place."""
    path = _write(tmp_path / "tiny.gguf", _tensors(False))
    rows, tiles = (
        prepare(path, stored, tmp_path / "cache"),
        prepare(path, stored, tmp_path / "cache", tiled=True),
    )
    expected, found = map_bits(rows.weights), map_bits(tiles.weights)

    assert found["embed"].shape == (1, 2, 16, 16, 2)  # a vocabulary of 4, padded
    gate_up = expected["1.gate_up"]
    for output, value in ((0, 0), (17, 33), (191, 63), (100, 40)):
        place = (output // 16, value // 32, value % 32 // 2, output % 16, value % 2)
        assert found["1.gate_up"][place] == gate_up[output, value]
    back = in_rows(found, rows.spec)
    assert back.keys() == expected.keys()
    assert all(np.array_equal(back[name], expected[name]) for name in expected)
    again = in_tiles(expected)
    assert all(np.array_equal(again[name], found[name]) for name in found)
