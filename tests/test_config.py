"""Configurations: what is accepted, what is refused and with which words, and what a machine makes of them."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve import config
from memserve.actors.global_scheduler import make_policy
from memserve.config import Config, Resolved
from memserve.engine.spec import ModelSpec
from memserve.engine.weights import random_weights
from memserve.errors import ConfigError
from memserve.settings import configfile, resolve
from memserve.settings.machine import Machine
from memserve.settings.rules import size_text
from memserve.settings.sections import ModelConfig

MINIMAL = '[model]\npath = "m.gguf"\n'
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
MACHINE = Machine(
    cores=4,
    free_bytes=8 << 30,
    log_dir="/tmp/logs",
    runtime_dir="/tmp/memserve-0-x",
    run="20260101-000000-beef",
)


@pytest.fixture
def written(tmp_path):
    """A function that writes a TOML file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "cluster.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def toy_model(monkeypatch):
    """Every model path leads to a toy model."""
    monkeypatch.setattr(resolve, "find_model", lambda path: Path("/models") / path)
    monkeypatch.setattr(resolve, "read_spec", lambda path: SPEC)


def problems(path: str, *overrides: str) -> list[str]:
    """The lines of the error, without the file's name at their start."""
    with pytest.raises(ConfigError) as caught:
        configfile.load(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_defaults_need_only_a_model(written):
    """The shortest file of the documentation, which names only a model, loads with defaults for all else."""
    loaded = configfile.load(written(MINIMAL))
    assert loaded == Config(model=ModelConfig(path="m.gguf"))
    assert [worker.shard for worker in loaded.worker] == [loaded.shard[0].name]


def test_every_mistake_is_reported_at_once_with_path_rule_value_and_hint(written):
    """All mistakes of a file are reported at once, each with its key, the rule, the value and a suggestion."""
    text = """
    [model]
    pth = "x"
    dtype = "bfloat61"
    weights = "int4"
    [pool]
    page_tokens = 4.7
    [[shard]]
    name = "s0"
    memory = "1GB"
    [[shard]]
    name = "s0"
    [[worker]]
    name = "w0"
    role = "prefil"
    shard = "s1"
    polcy = "least_load"
    [schduler]
    count = 1
    [frontend]
    port = 99999
    """
    assert problems(written(text)) == [
        "model.path is required and missing: a .gguf file or a Hugging Face directory; package:MODULE/FILE finds "
        "either in an installed Python package",
        'model.dtype must be one of bfloat16, float32, not "bfloat61"; did you mean "bfloat16"?',
        'model.weights must be one of dtype, int8, not "int4"; did you mean "int8"?',
        'model.pth is not a known key (value "x"); did you mean path?',
        "pool.page_tokens must be a whole number, not 4.7",
        'shard[0].memory must be a size such as "512MiB" or "2GiB", or a whole number of bytes, not "1GB"; '
        'did you mean "1GiB"?',
        'worker[0].role must be one of prefill, decode, both, not "prefil"; did you mean "prefill"?',
        'worker[0].polcy is not a known key (value "least_load"); did you mean scheduler.policy?',
        "frontend.port must be between 0 and 65535, not 99999",
        'schduler is not a known key (value {"count": 1}); did you mean scheduler?',
        'shard[1].name must be unique, not "s0": shard[0].name has it already',
        'worker[0].shard must name a [[shard]] (s0), not "s1"; did you mean "s0"?',
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("frontend.port", "4.7"),
        ("frontend.port", '"80"'),
        ("frontend.port", "true"),
        ("frontend.port", "{ a = 1 }"),
        ("pool.lease_s", '"10"'),
        ("pool.lease_s", "nan"),
        ("pool.lease_s", "true"),
        ("model.path", "3"),
        ("model.path", '""'),
        ("model.dtype", "2020-01-01"),
        ("model", "3"),
        ("cache.mode", "4"),
        ("cache.mode", "true"),
        ("shard.0.memory", "0"),
        ("shard.0.memory", '"1 GIB"'),
        ("shard.0.name", '"S0"'),
        ("shard.0.device", '"cuda"'),
        ("worker", "[]"),
        ("worker", '{ name = "w0" }'),
        ("worker.0", "3"),
        ("worker.0.name", '"frontend-0"'),
        ("frontend.api_keys", '"one"'),
        ("frontend.api_keys", "[1]"),
        ("frontend.api_keys", '["a b"]'),
        ("frontend.api_keys", '["a", "a"]'),
        ("frontend.cors_origins", "*"),
        ("frontend.cors_origins", '["http://localhost:3000/"]'),
        ("frontend.cors_origins", '["localhost:3000"]'),
        ("frontend.cors_origins", '["HTTP://localhost"]'),
        ("frontend.cors_origins", '["https://example.com:443"]'),
        ("frontend.cors_origins", '["https://*.example.com"]'),
        ("frontend.host", '"localhost:80"'),
        ("frontend.host", '"300.1.1.1"'),
        ("pool.page_tokens", "12"),
        ("pool.lease_s", "inf"),
        ("pool.lease_s", "9" * 400),
        ("pool.lease_s", "9" * 5000),
        ("shard.0.memory", f'"{"9" * 400}GiB"'),
        ("frontend.ttft_ms", "[" * 3000 + "]" * 3000),
        ("frontend.host", '"a..b"'),
        ("frontend.host", f'"{"a" * 64}.example"'),
    ],
)
def test_wrong_values_are_refused_not_converted(written, key, value):
    """Values of a wrong type or range are refused and never converted: 4.7 is no port."""
    (line,) = problems(written(MINIMAL), f"{key}={value}")
    assert line.startswith(f"--set {key}: ")
    assert "must" in line


def test_overrides_take_toml_values_bare_strings_names_and_indexes(written):
    """`--set` takes TOML values and bare strings, and reaches tables of a list by name or number."""
    text = MINIMAL + '[[shard]]\nname = "s0"\n[[worker]]\nname = "p0"\n[[worker]]\nname = "d0"\n'
    loaded = configfile.load(
        written(text),
        [
            "frontend.port=8123",
            "model.dtype=float32",
            "worker.0.threads=1",
            "worker.d0.threads = 2",
            'frontend.api_keys=["a", "b"]',
            'frontend.cors_origins=["*", "http://[::1]:3000", "app://obsidian.md"]',
            "frontend.host=0.0.0.0",
            "shard.s0.memory=2GiB",
            "cache.mode=2",
            "logging.dir=a=b",
        ],
    )
    assert loaded.frontend.port == 8123
    assert loaded.model.dtype == "float32"
    assert [worker.threads for worker in loaded.worker] == [1, 2]
    assert loaded.frontend.api_keys == ("a", "b")
    assert loaded.frontend.cors_origins == ("*", "http://[::1]:3000", "app://obsidian.md")
    assert loaded.frontend.host == "0.0.0.0"
    assert loaded.shard[0].memory == 2 << 30
    assert loaded.cache.mode == "2"
    assert loaded.logging.dir == "a=b"


def test_overrides_reach_the_default_tables(written):
    """`--set` also reaches a worker and a shard that the file leaves to the defaults."""
    loaded = configfile.load(written(MINIMAL), ["worker.w0.threads=1", "shard.0.memory=4MiB"])
    assert loaded.worker[0].threads == 1
    assert loaded.shard[0].memory == 4 << 20


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("frontend.port", "must be written KEY=VALUE"),
        (".port=1", "must be written KEY=VALUE"),
        ("worker.p9.threads=1", "must name a worker by name (w0) or number (0 to 0)"),
        ("worker.7.threads=1", "must name a worker by name (w0) or number (0 to 0)"),
        ("frontend.prt=1", "is not a known key (value 1); did you mean port?"),
        ("frontned.port=1", "did you mean frontend?"),
        ("model.path.x=1", "model.path is not a table"),
        ("port=1", "port is not a known key (value 1); did you mean frontend.port?"),
        ("model.port=1", "model.port is not a known key (value 1); did you mean frontend.port?"),
        ("path=x", "did you mean model.path or transfer.path?"),
        ("frontend.cors_origins=['http://a', 'http://b/']", 'cors_origins[1] must be "*" or an origin'),
    ],
)
def test_wrong_overrides_are_named_as_such(written, override, said):
    """A mistake in an override is reported as one of `--set`, not of the file."""
    (line,) = problems(written(MINIMAL), override)
    assert line.startswith("--set ")
    assert said in line


def test_roles_must_be_complete_on_each_shard(written):
    """A shard whose workers cannot both prefill and decode is refused: no request could finish there."""
    text = MINIMAL + '[[shard]]\nname = "s0"\n[[worker]]\nname = "p0"\nrole = "prefill"\n'
    said = 'worker must hold one that can decode, not only prefill: add a [[worker]] with role = "decode"'
    assert problems(written(text)) == [said]


def test_a_worker_must_say_which_of_several_shards_it_uses(written):
    """With more than one shard, each worker must name its shard."""
    text = MINIMAL + '[[shard]]\nname = "a"\n[[shard]]\nname = "b"\n[[worker]]\nname = "w0"\n'
    assert problems(written(text)) == ["worker[0].shard is required with more than one shard; known: a, b"]


@pytest.mark.parametrize("name", ["admin_keys", "priority_keys"])
def test_keys_with_rights_must_be_keys(written, name):
    """Keys with rights must be among the API keys, and the error does not show them."""
    path = written(MINIMAL + f'[frontend]\napi_keys = ["user", "boss"]\n{name} = ["boss"]\n')
    assert getattr(configfile.load(path).frontend, name) == ("boss",)
    for value in ('["boss", "s3cret"]', '["s3cret"]'):
        (line,) = problems(path, f"frontend.{name}={value}")
        assert f"frontend.{name}[{value.count(',')}] must be one of frontend.api_keys" in line
        assert "s3cret" not in line
    (line,) = problems(written(MINIMAL), f'frontend.{name}=["s3cret"]')
    assert "frontend.api_keys" in line and "s3cret" not in line


def test_api_keys_never_appear_in_errors(written):
    """Error messages about API keys do not contain the keys: they would end up in CI logs."""
    path = written(MINIMAL)
    for value in ('["s3cret key"]', '"s3cret"', '["s3cret", "s3cret"]', "[3, 's3cret']"):
        assert "s3cret" not in "\n".join(problems(path, f"frontend.api_keys={value}"))


def test_syntax_errors_say_line_and_column(written):
    """A syntax error is reported with its line and column."""
    (line,) = problems(written('[model]\npath = "m\n'))
    assert "not valid TOML" in line
    assert "line 2, column" in line


def test_missing_files_list_what_is_shipped(tmp_path):
    """A configuration that is not found is answered with a similar name that is shipped."""
    (line,) = problems("dmo")
    assert "there is no such file; did you mean demo?" in line
    assert "cannot be read" in problems(str(tmp_path / "x"), "a=b")[0] or "no such file" in line


def test_a_directory_is_called_one(tmp_path):
    """A directory instead of a file is refused as a directory, not as missing."""
    assert problems(str(tmp_path)) == ["is a directory; give a TOML file in it"]


@pytest.mark.parametrize("name", ["demo", "colocated", "2p2d"])
def test_shipped_configurations_load_by_name(name):
    """Shipped configurations load by name."""
    assert name in configfile.shipped()
    assert configfile.load(name).model.path.startswith("package:")


def test_every_setting_has_help_and_numbers_have_units():
    """Every setting has a help text, and every duration says that it is in seconds."""
    for section, cls in config.section_types().items():
        for field in attrs.fields(cls):
            assert field.metadata["help"], f"{section}.{field.name}"
            if field.name.endswith("_s"):
                assert field.metadata["unit"] == "seconds", f"{section}.{field.name}"


words = st.sampled_from(["", "x", "s0", "w0", "name", "path", "role", "shard", "both", "prefill", "1GiB"])
scalars = st.booleans() | st.integers(-1, 99) | st.just(0.5) | words
some_tables = st.dictionaries(words, scalars | st.lists(scalars, max_size=2), max_size=3)
sections = st.sampled_from([*config.section_types(), "x"])


@given(
    st.dictionaries(sections, scalars | some_tables | st.lists(some_tables | scalars, max_size=3), max_size=5)
)
def test_no_tree_of_values_escapes_as_anything_but_problems(tree):
    """Any tree of values gives either a configuration or a list of problems, never another exception."""
    configfile.fill_in(tree)
    loaded, wrong = configfile.structure(tree)
    assert (loaded is None) == bool(wrong)
    assert all(problem.text for problem in [*wrong, *configfile.cross_check(tree)])


# ---- resolving -----------------------------------------------------------------------------------------------


def test_resolved_counts_pages_and_threads_and_says_why(written, toy_model):
    """Resolving computes page sizes, page counts and threads, and gives the reasons that `check` shows."""
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
    """Resolved settings survive encoding as JSON: actors must run with what the supervisor decided."""
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
    """More memory than the machine has, or a context longer than the model's, is refused."""
    if not said:
        assert resolve.resolve(configfile.load(written(MINIMAL), overrides), MACHINE).shard_pages == {
            "s0": 128
        }
        return
    with pytest.raises(ConfigError, match=said.replace("(", r"\(").replace(")", r"\)")):
        resolve.resolve(configfile.load(written(MINIMAL), overrides), MACHINE)


def test_a_shard_too_small_for_one_context_says_what_would_fit(written, toy_model, monkeypatch):
    """A shard too small for one context is refused with the sizes that would fit."""
    monkeypatch.setattr(resolve, "read_spec", lambda path: attrs.evolve(SPEC, max_context=8192))
    with pytest.raises(ConfigError) as caught:
        resolve.resolve(configfile.load(written(MINIMAL), ["shard.s0.memory=1MiB"]), MACHINE)
    assert str(caught.value) == (
        "shard[0].memory must hold one context of 8192 tokens (2 MiB), not 1 MiB: "
        "raise it, or set model.max_context to at most 4096"
    )


def test_a_directory_is_checked_and_named(written, tmp_path):
    """A model directory with missing files is refused, with the names of all that are missing."""
    with pytest.raises(
        ConfigError, match=r"missing config\.json; missing tokenizer\.json; missing model\.saf"
    ):
        resolve.resolve(configfile.load(written(f'[model]\npath = "{tmp_path}"\n')), MACHINE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weights", ["dtype", "int8"])
@pytest.mark.parametrize("experts", [0, 5])
def test_weights_take_what_is_said(written, toy_model, monkeypatch, tied, dtype, weights, experts):
    """The memory that is planned for the weights equals what they take, for every dtype."""
    spec = attrs.evolve(SPEC, tied_embeddings=tied, experts=experts, experts_used=min(experts, 2))
    monkeypatch.setattr(resolve, "read_spec", lambda path: spec)
    loaded = configfile.load(written(MINIMAL), [f"model.dtype={dtype}", f"model.weights={weights}"])
    resolved = resolve.resolve(loaded, MACHINE)
    whole = sum(tensor.nbytes for tensor in random_weights(spec, loaded.model.stored, 0).values())
    assert resolve.weight_bytes(spec, loaded.model.stored) == whole
    (said,) = [one for one in resolved.reasons if one.key == "model.weights"]
    assert said.why == f"as {loaded.model.stored}, mapped once for all workers"
    assert said.value == size_text(whole)
    assert resolved.page_bytes == spec.page_bytes(16, dtype)


def test_a_missing_model_is_a_config_error(written):
    """A model path without a file is a ConfigError."""
    with pytest.raises(ConfigError, match=r"no file 'm\.gguf'"):
        resolve.resolve(configfile.load(written(MINIMAL)), MACHINE)


def test_this_machine_is_measured():
    """The machine has cores, free memory and absolute paths."""
    machine = Machine.here("logs")
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
    """The scheduler's policy prices fetching pages by the path between the configured shards, or not at all where none
    move."""
    found = configfile.load(name, list(settings))
    assert (found.pages_move, found.transfer_path) == (moves, path)
    cost = make_policy(found)
    assert (cost.weights.fetch, cost.weights.path) == (moves, path)
