"""Hugging Face directories: what their JSON files mean, and the errors for those that cannot be served."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch

from families import LLAMA3_ROPE, save_hf
from memserve.engine.checkpoint import read_spec
from memserve.engine.rope import rope_table
from memserve.engine.rope_scaling import llama3_factors
from memserve.engine.safetensors import Safetensors
from memserve.engine.spec import find_model
from memserve.engine.tokenizer import Tokenizer
from memserve.engine.weights import map_weights, prepare
from memserve.errors import UserError

QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 100}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Mistral, with an untied head, in one file."""
    return save_hf("mistral", tmp_path_factory.mktemp("hf") / "tiny-7.5b")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    copy = tmp_path / saved.name
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def change(path: Path, **keys: Any) -> Path:
    """Set keys of a JSON file; ``...`` removes one. Returns the directory."""
    value = (json.loads(path.read_text()) if path.exists() else {}) | keys
    path.write_text(json.dumps({key: one for key, one in value.items() if one is not ...}))
    return path.parent


def test_shards_are_one_model(saved: Path, tmp_path: Path) -> None:
    """Weights in several files give the same model as in one."""
    sharded = save_hf("mistral", tmp_path / "shards", max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = (map_weights(prepare(path, "float32", tmp_path).weights) for path in (saved, sharded))

    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """Weights in bfloat16 and float16 are read exactly."""
    from safetensors.torch import load_file, save_file

    halved = {name: one.to(dtype) for name, one in load_file(folder / "model.safetensors").items()}
    save_file(halved, folder / "model.safetensors")
    exact = map_weights(prepare(folder, "float32", tmp_path / "cache").weights)
    rounded = map_weights(prepare(folder, "bfloat16", tmp_path / "cache").weights)

    assert torch.equal(exact["head"], halved["lm_head.weight"].float())
    assert torch.equal(rounded["head"], halved["lm_head.weight"].bfloat16())
    assert rounded["norm"].dtype == torch.float32


def test_names_and_ends_and_template_are_found(folder: Path) -> None:
    """Name, begin and end tokens and chat template are found in the files that may hold them."""
    change(folder / "config.json", eos_token_id=7, bos_token_id=5)
    change(folder / "generation_config.json", eos_token_id=[7, 9])
    change(
        folder / "tokenizer_config.json",
        eos_token={"content": "<|eos|>"},
        bos_token="<|bos|>",
        chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
    )
    spec = read_spec(folder)
    assert (spec.name, spec.bos, spec.eos, spec.chat_template) == ("tiny-7.5b", 0, (1, 7, 9), "d")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert read_spec(folder).chat_template == "{{ messages }}"


def test_old_and_new_configurations_mean_the_same(folder: Path) -> None:
    """The older forms of rope settings, from before transformers 5, give the same model as the new ones."""
    new = {**LLAMA3_ROPE, "rope_theta": 5e5}
    spec = read_spec(change(folder / "config.json", rope_parameters=new))
    old = change(folder / "config.json", rope_parameters=..., rope_scaling=LLAMA3_ROPE, rope_theta=5e5)
    assert read_spec(old) == spec
    assert spec.rope_theta == 5e5
    assert spec.rope_factors == llama3_factors(5e5, 128, 8, 1, 4, 64)
    legacy = {"type": "linear", "factor": 2.0}
    assert read_spec(change(folder / "config.json", rope_scaling=legacy)).rope_factors == (2.0,) * 64


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": 1e6, "beta_fast": 16, "beta_slow": 0.5},
        {"truncate": False, "original_max_position_embeddings": 100},
        {"attention_factor": 1.25},
        {"mscale": 0.707, "mscale_all_dim": 1.0},
        {"mscale": 0.707},
        {"factor": 1.0},
        {"factor": None},
        {"original_max_position_embeddings": 8},
        {"beta_fast": 2, "beta_slow": 2, "truncate": False},
    ],
)
def test_yarn_is_transformers_yarn(folder: Path, changes: dict[str, Any]) -> None:
    """Long contexts of Qwen2.5 and Qwen3 would be answered worse, the further in the text a word stands."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 10_000.0, **YARN, **changes}
    spec = read_spec(change(folder / "config.json", rope_parameters=rope))
    config = AutoConfig.for_model("mistral", head_dim=128, max_position_embeddings=512, rope_parameters=rope)
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    cosines, sines = rope_table(spec)

    assert cosines.shape == (512, 64)
    assert spec.rope_scale == pytest.approx(scale)
    angles = np.arange(512)[:, None] * frequencies.double().numpy()
    assert np.abs(cosines - np.cos(angles) * scale).max() < 1e-4
    assert np.abs(sines - np.sin(angles) * scale).max() < 1e-4


def test_yarn_extends_the_context(folder: Path) -> None:
    """Who adds YaRN to Qwen2.5's config.json as its page says would still be refused long prompts."""
    config = folder / "config.json"
    assert read_spec(change(config, rope_parameters={**YARN, "factor": 8.0})).max_context == 1024
    assert read_spec(change(config, rope_parameters={**YARN, "factor": 2.0})).max_context == 512
    old = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert read_spec(change(config, rope_parameters=..., rope_scaling=old)).max_context == 2048


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factor": math.inf}, "factor must be a positive number, got inf"),
        ({"factor": 1e9}, "YaRN over 128000000000 positions"),
        ({"beta_fast": 1, "beta_slow": 2}, "a beta_fast not below beta_slow"),
        ({"rope_theta": 1.0}, "YaRN needs a rope_theta above 1"),
        ({"original_max_position_embeddings": 4}, "YaRN from 4 positions fits no frequency"),
        ({"truncate": "no"}, "truncate must be true or false, got 'no'"),
        ({"extrapolation_factor": 0.5}, "extrapolation_factor is 0.5, expected 1.0"),
        ({"attn_factor": 2.0}, "attn_factor is 2.0, expected 1.0"),
        ({"attention_factor": 0}, "attention_factor must be a positive number"),
        ({"original_max_position_embeddings": "x"}, "original_max_position_embeddings must be"),
    ],
)
def test_yarn_that_is_not_known_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    """A model would run with another rope than it was trained for, or not start for an unclear reason."""
    with pytest.raises(UserError, match=re.escape(said)):
        read_spec(change(folder / "config.json", rope_parameters={**YARN, **changes}))


@pytest.mark.parametrize(
    ("keys", "window", "local_layers"),
    [
        ({"sliding_window": 100}, 100, (0, 1)),
        ({"sliding_window": 4096}, None, ()),
        ({"sliding_window": None}, None, ()),
        ({"sliding_window": 100, "use_sliding_window": False}, None, ()),
        ({"model_type": "llama", "sliding_window": 100}, None, ()),
        ({"sliding_window": ..., "max_position_embeddings": 32768}, 4096, (0, 1)),
        ({**QWEN, "use_sliding_window": False}, None, ()),
        (QWEN, None, ()),
        ({**QWEN, "max_window_layers": 0}, 100, (0, 1)),
        ({**QWEN, "max_window_layers": 1}, 100, (1,)),
        ({**QWEN, "layer_types": ["sliding_attention", "full_attention"]}, 100, (0,)),
        ({**QWEN, "model_type": "qwen3_moe", **EXPERTS}, 100, (0, 1)),
    ],
)
def test_a_sliding_window_limits_its_layers(
    folder: Path, keys: dict[str, Any], window: int | None, local_layers: tuple[int, ...]
) -> None:
    """A window limits the layers that transformers limits, and not the context."""
    spec = read_spec(change(folder / "config.json", **keys))
    assert (spec.sliding_window, spec.local_layers) == (window, local_layers)
    assert spec.max_context == keys.get("max_position_embeddings", 512)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types must list the kinds of 2 layers"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "layer_types has 'chunked_attention'"),
        ({"max_window_layers": "x"}, "max_window_layers must be an integer, got 'x'"),
    ],
)
def test_windows_that_are_not_known_are_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    """A model would run with other attention than it was trained for."""
    with pytest.raises(UserError, match=re.escape(said)):
        read_spec(change(folder / "config.json", **QWEN, **changes))


def test_a_tied_head_that_is_stored_is_not_served_twice(folder: Path, tmp_path: Path) -> None:
    """A head that is stored although it is tied is accepted and not loaded."""
    files = prepare(change(folder / "config.json", tie_word_embeddings=True), "float32", tmp_path / "cache")
    assert files.spec.tied_embeddings
    assert "head" not in map_weights(files.weights)


def test_conversion_is_keyed_by_content_and_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    """A model is converted once for its content, again after a change, and without importing torch."""
    code = "import sys; from pathlib import Path; from memserve.engine.weights import prepare\n"
    code += "prepare(sys.argv[1], 'float32', Path(sys.argv[2])); assert 'torch' not in sys.modules"
    cache = tmp_path / "cache"
    subprocess.run([sys.executable, "-c", code, str(folder), str(cache)], check=True, timeout=60)
    first = prepare(folder, "float32", cache)
    assert len(list((cache / "models").glob("*/spec.json"))) == 1
    assert first.tokenizer.read_bytes() == (folder / "tokenizer.json").read_bytes()
    change(folder / "config.json", eos_token_id=3)
    assert prepare(folder, "float32", cache).spec == attrs.evolve(first.spec, eos=(1, 3))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; supported: llama, mistral, qwen2, qwen3",
        ),
        ({"architectures": ["MistralForSequenceClassification"]}, "only ...ForCausalLM"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}},
            "'longrope' is not supported; supported: default, ",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a positive number, but is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope over part of a head"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "take the model in BF16, F16 or F32"),
        ({"num_attention_heads": "3"}, "num_attention_heads must be a positive integer, got '3'"),
        ({"num_key_value_heads": 3}, "multiple of kv heads"),
    ],
)
def test_what_would_answer_nonsense_is_refused_by_key(folder: Path, keys: dict[str, Any], said: str) -> None:
    """A variant that is not supported is refused with the key that says so: ignored, it would give nonsense."""
    change(folder / "config.json", **keys)
    with pytest.raises(UserError) as caught:
        read_spec(folder)
    assert said in str(caught.value) and str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_is_a_user_error(folder: Path, name: str, content: bytes) -> None:
    """A damaged JSON file is a user error that names the file."""
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: not readable as JSON"):
        read_spec(folder)


def test_what_a_directory_lacks_is_named_all_at_once(tmp_path: Path) -> None:
    """All that a directory lacks is named at once, with advice on pickled weights and SentencePiece files."""
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError) as caught:
        read_spec(find_model(str(tmp_path)))
    for part in (
        "missing config.json",
        "m.gguf",
        "AutoTokenizer",
        "model.safetensors.index.json",
        "AutoModelForCausalLM",
    ):
        assert part in str(caught.value)


def test_a_missing_shard_is_named_and_a_path_as_one_refused(folder: Path) -> None:
    """A missing weight file is named, and one whose name is a path is refused."""
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(UserError, match=r"missing model-2\.safetensors"):
        read_spec(folder)
    index.write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(UserError, match="not a plain file name"):
        read_spec(folder)


def test_foreign_tensors_and_shapes_are_refused(folder: Path, tmp_path: Path) -> None:
    """Tensors that the model does not have, or of other shapes, are refused; known leftovers are ignored."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(512)}, folder / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"not part of a mistral model.*q_proj\.bias"):
        prepare(folder, "float32", tmp_path / "cache")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(64)}
    save_file(tensors | old, folder / "model.safetensors")
    prepare(folder, "float32", tmp_path / "cache")
    with pytest.raises(UserError, match=r"shapes.*expected \(300, 96\)"):
        prepare(change(folder / "config.json", vocab_size=300), "float32", tmp_path / "cache")


def test_every_truncation_of_a_file_is_a_user_error(tmp_path: Path) -> None:
    """A safetensors file that is cut at any length, or of an unknown type, is a user error."""
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "w")
    whole, cut = (tmp_path / "w").read_bytes(), tmp_path / "cut"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError):
            Safetensors.open([cut])
    save_file({"a": torch.ones(3, dtype=torch.int64)}, tmp_path / "w")
    with pytest.raises(UserError, match="data type I64, which is not supported; supported: F32, F16, BF16"):
        Safetensors.open([tmp_path / "w"])


@pytest.mark.parametrize(
    "damage",
    [
        {"dtype": []},
        {"shape": [math.inf]},
        {"shape": [-3, -4]},
        {"shape": ["3", "4"]},
        {"shape": [3.5, 4]},
        {"data_offsets": [0.0, 48.0]},
        {"data_offsets": [-48, 0]},
        {"data_offsets": [0, 1 << 80]},
    ],
)
def test_a_hostile_header_is_a_user_error(tmp_path: Path, damage: dict[str, Any]) -> None:
    """It would end a start in a traceback that does not name the file."""
    entry = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]} | damage
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + bytes(48))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "w"))):
        Safetensors.open([tmp_path / "w"])


def test_a_tokenizer_that_cannot_be_served_is_refused_at_conversion(folder: Path, tmp_path: Path) -> None:
    """A tokenizer of an unsupported type is refused at conversion, before actors start."""
    from tokenizers import Tokenizer as Built
    from tokenizers import models

    Built(models.WordLevel({"a": 0}, "a")).save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="type WordLevel is not supported"):
        prepare(folder, "float32", tmp_path / "cache")


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    """A tokenizer with more ids than the embedding table is refused: such a token would end a worker's step."""
    from tokenizers import Tokenizer as Built

    built = Built.from_file(str(folder / "tokenizer.json"))
    built.add_special_tokens(["<pad>"])
    built.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="ids up to 132, the embedding table up to 131"):
        prepare(folder, "float32", tmp_path / "cache")


def test_the_directorys_tokenizer_serves(saved: Path, tmp_path: Path) -> None:
    """The tokenizer of a directory encodes, decodes and knows its special tokens."""
    tokenizer = Tokenizer.load(prepare(saved, "float32", tmp_path).tokenizer)
    assert tokenizer.decode(tokenizer.encode("Hi there<|eos|>", True), False) == "Hi there<|eos|>"
    assert tokenizer.specials["<|eos|>"] == 1
