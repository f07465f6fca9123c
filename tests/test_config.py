"""Configurations: what is accepted, what is refused and in which words."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memserve import config
from memserve.config import Config
from memserve.errors import ConfigError, UserError
from memserve.settings import configfile, resolve
from memserve.settings.network import find_network
from memserve.settings.sections import ClusterConfig, ModelConfig

MINIMAL = '[model]\npath = "m.gguf"\n'


def problems(path: str, *overrides: str) -> list[str]:
    """The lines of the error, without the file's name where they begin with it."""
    with pytest.raises(ConfigError) as caught:
        configfile.load(path, overrides)
    return [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]


def test_defaults_need_only_a_model(written):
    """If it failed, the shortest file that the documentation shows would not start."""
    loaded = configfile.load(written(MINIMAL))
    assert loaded == Config(model=ModelConfig(path="m.gguf"))
    assert [worker.shard for worker in loaded.worker] == [loaded.shard[0].name]


def test_a_byte_order_mark_is_no_mistake(written):
    """If it failed, a file saved by an editor that begins files with one would have an error that nobody can see."""
    assert configfile.load(written("\ufeff" + MINIMAL)).model.path == "m.gguf"


def test_every_mistake_is_reported_at_once_with_path_rule_value_and_hint(written):
    """If it failed, users would repair one key a try, or not learn which of the tables is meant."""
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
        "model.path is required and missing",
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
    """If it failed, 4.7 would become port 4, or a wrong value would surface as a traceback in some actor."""
    (line,) = problems(written(MINIMAL), f"{key}={value}")
    assert line.startswith(f"--set {key}: ")
    assert "must" in line


def test_overrides_take_toml_values_bare_strings_names_and_indexes(written):
    """If it failed, `--set` could not reach some keys, or would need quotes within quotes."""
    text = MINIMAL + '[[shard]]\nname = "s0"\n[[worker]]\nname = "p0"\n[[worker]]\nname = "d0"\n'
    loaded = configfile.load(
        written(text),
        [
            "frontend.port=8123",
            "model.dtype=float32",
            "worker.0.threads=1",
            "worker.d0.threads = 2",
            'frontend.api_keys=["a", "b"]',
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
    assert loaded.frontend.host == "0.0.0.0"
    assert loaded.shard[0].memory == 2 << 30
    assert loaded.cache.mode == "2"
    assert loaded.logging.dir == "a=b"


def test_overrides_reach_the_default_tables(written):
    """If it failed, `--set worker.w0.threads=1` would only work in files that spell the worker out."""
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
    ],
)
def test_wrong_overrides_are_named_as_such(written, override, said):
    """If it failed, a user would look for the mistake in the file."""
    (line,) = problems(written(MINIMAL), override)
    assert line.startswith("--set ")
    assert said in line


def test_roles_must_be_complete_on_each_shard(written):
    """If it failed, a cluster would start in which no request can ever finish."""
    text = MINIMAL + '[[shard]]\nname = "s0"\n[[worker]]\nname = "p0"\nrole = "prefill"\n'
    assert problems(written(text)) == ["worker must hold one that can decode, not only prefill"]


@pytest.mark.parametrize("networked", [False, True])
def test_roles_must_be_complete_on_each_side_of_the_bus(written, networked):
    """If it failed, prompts would run in host memory whose pages no decode worker could ever get."""
    text = MINIMAL + '[[shard]]\nname = "h"\n[[shard]]\nname = "g"\ndevice = "cuda:0"\n'
    text += '[[worker]]\nname = "p0"\nshard = "h"\nrole = "prefill"\n'
    text += '[[worker]]\nname = "d0"\nshard = "g"\nrole = "decode"\n'
    cluster = '[cluster]\nlisten = "127.0.0.1:7070"\nkey = "k"\n' if networked else ""
    found = problems(written(text + cluster))
    said = "must hold one that can prefill on a GPU, not only decode: pages do not move between GPUs and host memory"
    assert f"worker {said}" in found
    assert len(found) == (1 if networked else 2), "another host may have what is missing in host memory"
    assert configfile.load(written(text), ["worker.p0.role=both", "worker.d0.role=both"])


@pytest.mark.parametrize(
    ("shipped", "path", "others"),
    [("2shards", "cuda", "auto, mapped, tcp or nixl"), ("two-gpus", "tcp", "auto or cuda")],
)
def test_pages_must_have_a_path(shipped, path, others):
    """If it failed, every prompt would be computed twice, and nobody would know why."""
    (line,) = problems(shipped, f"transfer.path={path}")
    assert f'transfer.path must be {others}, not "{path}"' in line
    assert configfile.load(shipped, ["transfer.path=auto"])


def test_a_worker_must_say_which_of_several_shards_it_uses(written):
    """If it failed, workers would land on a shard by accident of order."""
    text = MINIMAL + '[[shard]]\nname = "a"\n[[shard]]\nname = "b"\n[[worker]]\nname = "w0"\n'
    assert problems(written(text)) == ["worker[0].shard is required with more than one shard; known: a, b"]


@pytest.mark.parametrize("name", ["admin_keys", "priority_keys"])
def test_keys_with_rights_must_be_keys(written, name):
    """If it failed, a mistyped key would leave nobody with the right, or its holder locked out."""
    path = written(MINIMAL + f'[frontend]\napi_keys = ["user", "boss"]\n{name} = ["boss"]\n')
    assert getattr(configfile.load(path).frontend, name) == ("boss",)
    for value in ('["boss", "s3cret"]', '["s3cret"]'):
        (line,) = problems(path, f"frontend.{name}={value}")
        assert f"frontend.{name}[{value.count(',')}] must be one of frontend.api_keys" in line
        assert "s3cret" not in line
    (line,) = problems(written(MINIMAL), f'frontend.{name}=["s3cret"]')
    assert "frontend.api_keys" in line and "s3cret" not in line


def test_api_keys_never_appear_in_errors(written):
    """If it failed, keys would end in terminals' histories and CI logs."""
    path = written(MINIMAL)
    for value in ('["s3cret key"]', '"s3cret"', '["s3cret", "s3cret"]', "[3, 's3cret']"):
        assert "s3cret" not in "\n".join(problems(path, f"frontend.api_keys={value}"))


@pytest.mark.parametrize(
    "text",
    [
        '[frontend]\napi_key = "s3cret"\n',
        '[frontend]\nkeys = ["s3cret"]\n',
        '[fronted]\napi_keys = ["s3cret"]\n',
        '[pool]\nadmin_keys = ["s3cret"]\n',
    ],
)
def test_a_key_under_a_mistyped_name_does_not_appear_either(written, text):
    """If it failed, one letter too few would print the key."""
    (line,) = problems(written(MINIMAL + text))
    assert "is not a known key (value hidden)" in line


def test_a_table_in_place_of_an_array_is_one_mistake(written):
    """If it failed, [shard] for [[shard]] would be said to leave out the workers' shards, too."""
    (line,) = problems(written(MINIMAL + '[shard]\nname = "s0"\n'))
    assert "shard must be an array of tables: write its name in double brackets" in line


@pytest.mark.parametrize("text", ["x = " + "9" * 5000, "x = " + "[" * 3000 + "]" * 3000])
def test_what_the_parser_gives_up_on_is_called_so(written, text):
    """If it failed, a damaged file would be answered by a traceback."""
    assert problems(written(text))[0].startswith("not valid TOML: ")


def test_a_home_that_is_not_there_is_called_so():
    """If it failed, ~logs for ~/logs would be a traceback."""
    missing = "begins with ~, and no such home directory is known"
    with pytest.raises(UserError, match=f"--config: '~nobody-x/c.toml' {missing}"):
        configfile.load("~nobody-x/c.toml")
    with pytest.raises(UserError, match=f"logging.dir: '~nobody-x' {missing}"):
        resolve.Machine.here("~nobody-x")
    key = ClusterConfig(listen="127.0.0.1:7070", key="~nobody-x/key")
    with pytest.raises(UserError, match=f"cluster.key: '~nobody-x/key' {missing}"):
        find_network(key)
    with pytest.raises(UserError, match=f"model.path: '~nobody-x/m.gguf' {missing}"):
        resolve.find_model("~nobody-x/m.gguf")


def test_syntax_errors_say_line_and_column(written):
    """If it failed, a missing quote would have to be found by eye."""
    (line,) = problems(written('[model]\npath = "m\n'))
    assert "not valid TOML" in line
    assert "line 2, column" in line


def test_missing_files_list_what_is_shipped(tmp_path):
    """If it failed, `up -c dmo` would not lead to demo."""
    (line,) = problems("dmo")
    assert "there is no such file; did you mean demo?" in line
    assert "cannot be read" in problems(str(tmp_path / "x"), "a=b")[0] or "no such file" in line


def test_a_directory_is_called_one(tmp_path):
    """If it failed, a user would be told that a path that is plainly there does not exist."""
    assert problems(str(tmp_path)) == ["is a directory; give a TOML file in it"]


@pytest.mark.parametrize("name", ["demo", "colocated", "2p2d"])
def test_shipped_configurations_load_by_name(name):
    """If it failed, an installed memserve could not run its own examples."""
    assert name in configfile.shipped()
    assert configfile.load(name).model.path.startswith("package:")


def test_every_setting_has_help_and_numbers_have_units():
    """If it failed, a setting would be explained nowhere."""
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
    """If it failed, some wrong file would give a traceback instead of a list of mistakes."""
    configfile.fill_in(tree)
    loaded, wrong = configfile.structure(tree)
    assert (loaded is None) == bool(wrong)
    assert all(problem.text for problem in [*wrong, *configfile.cross_check(tree)])
