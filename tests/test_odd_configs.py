"""Configurations that are odd rather than mistyped: what a parser gives up on, keys in the wrong place, shards out of reach."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from memserve.errors import UserError
from memserve.settings import configfile, resolve
from memserve.settings.machine import Machine
from memserve.settings.network import find_network
from memserve.settings.sections import ClusterConfig
from test_config import MINIMAL, problems


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Writes a TOML file; the result is its path."""

    def write(text: str) -> str:
        (tmp_path / "cluster.toml").write_text(text)
        return str(tmp_path / "cluster.toml")

    return write


def test_a_byte_order_mark_is_no_mistake(file):
    """If it failed, a file saved by an editor that begins files with one would have an error that nobody can see."""
    assert configfile.load(file("\ufeff" + MINIMAL)).model.path == "m.gguf"


def test_a_missing_table_is_reported_as_its_missing_key(file):
    """A file without [model] is told what to write, as one whose [model] has no path."""
    (line,) = problems(file("[frontend]\nport = 8000\n"))
    assert line.startswith("model.path is required and missing: a .gguf file or")


@pytest.mark.parametrize("networked", [False, True])
def test_roles_must_be_complete_on_each_side_of_the_bus(file, networked):
    """If it failed, prompts would run in host memory whose pages no decode worker could ever get."""
    text = MINIMAL + '[[shard]]\nname = "h"\n[[shard]]\nname = "g"\ndevice = "cuda:0"\n'
    text += '[[worker]]\nname = "p0"\nshard = "h"\nrole = "prefill"\n'
    text += '[[worker]]\nname = "d0"\nshard = "g"\nrole = "decode"\n'
    cluster = '[cluster]\nlisten = "127.0.0.1:7070"\nkey = "k"\n' if networked else ""
    found = problems(file(text + cluster))
    said = "must hold one that can prefill on a GPU, not only decode: pages do not move between GPUs and host memory"
    remedy = 'so add a [[worker]] with role = "prefill" there'
    assert f"worker {said}, {remedy}" in found
    assert len(found) == (1 if networked else 2), "another host may have what is missing in host memory"
    assert configfile.load(file(text), ["worker.p0.role=both", "worker.d0.role=both"])


@pytest.mark.parametrize(
    ("shipped", "path", "others"),
    [("2shards", "cuda", "auto, mapped, tcp or nixl"), ("two-gpus", "tcp", "auto or cuda")],
)
def test_pages_must_have_a_path(shipped, path, others):
    """If it failed, every prompt would be computed twice, and nobody would know why."""
    (line,) = problems(shipped, f"transfer.path={path}")
    assert f'transfer.path must be {others}, not "{path}"' in line
    assert configfile.load(shipped, ["transfer.path=auto"])


@pytest.mark.parametrize(
    "text",
    [
        '[frontend]\napi_key = "s3cret"\n',
        '[frontend]\nkeys = ["s3cret"]\n',
        '[fronted]\napi_keys = ["s3cret"]\n',
        '[pool]\nadmin_keys = ["s3cret"]\n',
    ],
)
def test_a_key_under_a_mistyped_name_does_not_appear_either(file, text):
    """If it failed, one letter too few would print the key."""
    (line,) = problems(file(MINIMAL + text))
    assert "is not a known key (value hidden)" in line


def test_a_table_in_place_of_an_array_is_one_mistake(file):
    """If it failed, [shard] for [[shard]] would be said to leave out the workers' shards, too."""
    (line,) = problems(file(MINIMAL + '[shard]\nname = "s0"\n'))
    assert "shard must be an array of tables: write its name in double brackets" in line


@pytest.mark.parametrize("text", ["x = " + "9" * 5000, "x = " + "[" * 3000 + "]" * 3000])
def test_what_the_parser_gives_up_on_is_called_so(file, text):
    """If it failed, a damaged file would be answered by a traceback."""
    assert problems(file(text))[0].startswith("not valid TOML: ")


def test_a_home_that_is_not_there_is_called_so():
    """If it failed, ~logs for ~/logs would be a traceback."""
    missing = "begins with ~, and no such home directory is known"
    with pytest.raises(UserError, match=f"--config: '~nobody-x/c.toml' {missing}"):
        configfile.load("~nobody-x/c.toml")
    with pytest.raises(UserError, match=f"logging.dir: '~nobody-x' {missing}"):
        Machine.here("~nobody-x")
    key = ClusterConfig(listen="127.0.0.1:7070", key="~nobody-x/key")
    with pytest.raises(UserError, match=f"cluster.key: '~nobody-x/key' {missing}"):
        find_network(key)
    with pytest.raises(UserError, match=f"model.path: '~nobody-x/m.gguf' {missing}"):
        resolve.find_model("~nobody-x/m.gguf")
