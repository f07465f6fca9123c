"""What a machine makes of a configuration: pages, threads and paths, and what it cannot do."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from memserve.actors.global_scheduler import make_policy
from memserve.config import Resolved
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import random_weights
from memserve.errors import ConfigError
from memserve.settings import configfile, resolve
from test_config import MINIMAL

SPEC = ModelSpec(
    name="toy",
    architecture="llama",
    layers=2,
    hidden=64,
    intermediate=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    vocab=100,
    rope_theta=10000.0,
    rms_eps=1e-5,
    max_context=2048,
    tied_embeddings=True,
    bos=None,
    eos=(2,),
    chat_template="{{ messages }}",
)
MACHINE = resolve.Machine(
    cores=4,
    free_bytes=8 << 30,
    log_dir="/tmp/logs",
    runtime_dir="/tmp/memserve-0-x",
    run="20260101-000000-beef",
)


@pytest.fixture
def toy_model(monkeypatch):
    """Every path is a toy model's."""
    monkeypatch.setattr(resolve, "find_model", lambda path: Path("/models") / path)
    monkeypatch.setattr(resolve, "read_spec", lambda path: SPEC)


def test_resolved_counts_pages_and_threads_and_says_why(written, toy_model):
    """If it failed, `check` would not explain a cluster, or actors would disagree on page counts."""
    loaded = configfile.load(written(MINIMAL), ["shard.s0.memory=1MiB", "worker.w0.threads=99"])
    resolved = resolve.resolve(loaded, MACHINE)
    assert resolved.page_bytes == SPEC.layers * 2 * SPEC.kv_heads * 16 * SPEC.head_dim * 2 == 4096 * 1
    assert resolved.shard_pages == {"s0": 256}
    assert resolved.threads == {"w0": 4}
    assert resolved.max_context == 2048
    assert resolved.run_dir == "/tmp/logs/20260101-000000-beef"
    why = {reason.key: reason.why for reason in resolved.reasons}
    assert why["worker.w0.threads"] == "99 asked for, but this process may use 4 cores"
    assert "4096 tokens, 2.0 full contexts" in why["shard.s0"]


def test_resolved_survives_json(written, toy_model):
    """If it failed, actors would run with other settings than the supervisor decided."""
    loaded = configfile.load(written(MINIMAL), ['frontend.api_keys=["k"]', "pool.lease_s=3"])
    resolved = resolve.resolve(loaded, MACHINE)
    assert Resolved.from_json(resolved.to_json()) == resolved


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["shard.s0.memory=1MiB", "pool.page_tokens=8", "model.dtype=float32", "model.max_context=4096"],
            "2048",
        ),
        (["shard.s0.memory=9GiB"], "shard.memory must fit in the machine's free memory (8 GiB)"),
        (["shard.s0.memory=1MiB", "model.dtype=float32"], ""),
    ],
)
def test_what_the_machine_cannot_do_is_refused(written, toy_model, overrides, said):
    """If it failed, a cluster would be killed for want of memory, or its longest request would never fit."""
    if not said:
        assert resolve.resolve(configfile.load(written(MINIMAL), overrides), MACHINE).shard_pages == {
            "s0": 128
        }
        return
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
        resolve.resolve(configfile.load(written(MINIMAL), overrides), MACHINE)


def test_a_shard_too_small_for_one_context_says_what_would_fit(written, toy_model, monkeypatch):
    """If it failed, the user would have to guess the size that is enough."""
    monkeypatch.setattr(resolve, "read_spec", lambda path: attrs.evolve(SPEC, max_context=8192))
    with pytest.raises(ConfigError) as caught:
        resolve.resolve(configfile.load(written(MINIMAL), ["shard.s0.memory=1MiB"]), MACHINE)
    assert str(caught.value) == (
        "shard[0].memory must hold one context of 8192 tokens (2 MiB), not 1 MiB: "
        "raise it, or set model.max_context to at most 4096"
    )


def test_a_sliding_window_is_said_to_be_the_limit(written, toy_model, monkeypatch):
    """If it failed, nobody would know why a model of 32768 tokens takes 4096."""
    windowed = attrs.evolve(SPEC, sliding_window=2048)
    monkeypatch.setattr(resolve, "read_spec", lambda path: windowed)
    why = {one.key: one.why for one in resolve.resolve(configfile.load(written(MINIMAL)), MACHINE).reasons}
    assert why["model.max_context"] == "the model's sliding window, as attention here is full"
    with pytest.raises(ConfigError, match=r"sliding window, .* \(2048 tokens\), not 4096"):
        resolve.resolve(configfile.load(written(MINIMAL), ["model.max_context=4096"]), MACHINE)


def test_a_directory_is_checked_and_named(written, tmp_path):
    """If it failed, `check` would pass over a directory that `up` cannot serve, or not say what it lacks."""
    with pytest.raises(
        ConfigError, match=r"missing config\.json; missing tokenizer\.json; missing model\.saf"
    ):
        resolve.resolve(configfile.load(written(f'[model]\npath = "{tmp_path}"\n')), MACHINE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weights", ["dtype", "int8"])
def test_weights_take_what_is_said(written, toy_model, monkeypatch, tied, dtype, weights):
    """If it failed, a machine would be taken for large enough that is not, or the other way round."""
    spec = attrs.evolve(SPEC, tied_embeddings=tied)
    monkeypatch.setattr(resolve, "read_spec", lambda path: spec)
    loaded = configfile.load(written(MINIMAL), [f"model.dtype={dtype}", f"model.weights={weights}"])
    resolved = resolve.resolve(loaded, MACHINE)
    whole = sum(tensor.nbytes for tensor in random_weights(spec, loaded.model.stored, 0).values())
    assert resolve.weight_bytes(spec, loaded.model.stored) == whole
    (said,) = [one for one in resolved.reasons if one.key == "model.weights"]
    assert said.why == f"as {loaded.model.stored}, mapped once for all workers"
    assert said.value == resolve.size(whole)
    assert resolved.page_bytes == spec.page_bytes(16, dtype)


def test_a_missing_model_is_a_config_error(written):
    """If it failed, a wrong path would be a traceback."""
    with pytest.raises(ConfigError, match=r"no file 'm\.gguf'"):
        resolve.resolve(configfile.load(written(MINIMAL)), MACHINE)


def test_this_machine_is_measured():
    """If it failed, threads or memory would be planned for another machine."""
    machine = resolve.Machine.here("logs")
    assert machine.cores >= 1
    assert machine.free_bytes > 0
    assert Path(machine.log_dir).is_absolute()
    assert Path(machine.runtime_dir).is_absolute()


@pytest.mark.parametrize(
    ("name", "settings", "moves", "path"),
    [
        ("demo", (), False, "mapped"),
        ("2shards", (), True, "mapped"),
        ("2shards", ("transfer.path=tcp",), True, "tcp"),
        ("one-gpu", (), False, "cuda"),
        ("two-gpus", (), True, "cuda"),
        ("two-hosts-first", (), True, "mapped"),
        ("two-hosts-first", ("shard.0.device=cuda:0", "worker.0.role=both"), False, "cuda"),
    ],
)
def test_schedulers_know_whether_and_how_pages_move(name, settings, moves, path):
    """Else pages of two GPUs would be computed again that could be fetched, or priced like another machine's."""
    found = configfile.load(name, list(settings))
    assert (found.pages_move, found.transfer_path) == (moves, path)
    cost = make_policy(found)
    assert (cost.weights.fetch, cost.weights.path) == (moves, path)
