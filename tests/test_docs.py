"""The documentation compared with the code: settings, commands, events and file names."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import get_args

import attrs
import pytest

from loadgen import build
from loadgen import cli as loadgen_cli
from loadgen import options as loadgen_options
from memserve import cli, config
from memserve.engine.families import FAMILIES
from memserve.engine.gguf import BLOCKS
from memserve.engine.gguf_tokenizer import MODELS, PRE_TOKENIZERS
from memserve.engine.hf import ROPE_TYPES
from memserve.engine.safetensors import DTYPES
from memserve.settings import configfile

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OUTSIDE = {"cluster.toml", "logs/"}
"""Files that users have and the repository has not."""
WALKS = (
    ROOT / "README.md",
    *(
        DOCS / f"{name}.md"
        for name in (
            "one-request",
            "operations",
            "configuration",
            "models",
            "benchmarking",
            "mempool",
            "transfers",
            "simulator",
            "gpu",
        )
    ),
)


def text(path: Path) -> str:
    """The text of a page, which must exist."""
    assert path.is_file(), f"{path.relative_to(ROOT)} lacks"
    return path.read_text()


def setting_row(field: attrs.Attribute) -> str:
    """The line about a setting that docs/configuration.md must have."""
    default, rule = field.default, field.metadata["rule"]
    default = str(default).lower() if isinstance(default, bool) else default  # as TOML has it
    shown = {attrs.NOTHING: "required", None: "unset", (): "none", "": "unset"}.get(default, f"`{default}`")
    must = rule.text if rule else ""
    return f"| `{field.name}` | {shown} | {field.metadata['unit']} | {must} | {field.metadata['help']} |"


@pytest.mark.parametrize("section", config.section_types())
def test_every_setting_is_documented_as_it_is(section):
    """docs/configuration.md has each setting with its default, unit, rule and meaning."""
    page = text(DOCS / "configuration.md")
    heading = f"## `[[{section}]]`" if section in ("shard", "worker") else f"## `[{section}]`"
    assert heading in page, heading
    part = page.partition(heading)[2].partition("\n## ")[0]
    for field in attrs.fields(config.section_types()[section]):
        assert setting_row(field) in part.splitlines(), (
            f"expected this line under {heading}:\n{setting_row(field)}"
        )


def commands() -> dict[str, list[str]]:
    """The options of each command, by their long names."""
    found = {}
    for name in ("up", "key", "check", "status", "join", "role", "drain", "logs", "sim", "version"):
        arguments = cli.app[name].assemble_argument_collection()
        found[name] = [
            option for argument in arguments for option in argument.names if option.startswith("--")
        ]
    return found


def test_every_command_and_option_is_documented():
    """docs/operations.md has every command and option."""
    page = text(DOCS / "operations.md")
    for command, options in commands().items():
        heading = f"## `memserve {command}`"
        assert heading in page
        part = page.partition(heading)[2].partition("\n## ")[0]
        for option in options:
            assert f"`{option}" in part, f"{option} under {heading}"


def test_every_documented_event_is_one_that_is_logged():
    """Every event that docs/operations.md lists is logged somewhere."""
    part = text(DOCS / "operations.md").partition("### Events")[2].partition("\n## ")[0]
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    events = [
        event
        for cell in re.findall(r"^\| ([^|]+) \|", part, re.M)
        for event in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(events) > 10
    assert not [event for event in events if f'"{event}"' not in source]


@pytest.mark.parametrize("page", WALKS, ids=lambda path: path.name)
def test_every_file_that_is_mentioned_exists(page):
    """Every file that the pages mention exists."""
    mentioned = set(re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|toml|md|cpp|txt)|(?:[\w.-]+/)+)`", text(page)))
    mentioned |= set(re.findall(r"\]\(([^)#:]+)\)", text(page)))
    places = (ROOT, ROOT / "src" / "memserve", ROOT / "docs")
    missing = [name for name in mentioned - OUTSIDE if not any((place / name).exists() for place in places)]
    assert not missing


def test_what_loads_is_documented_as_it_is():
    """docs/models.md lists the families, tensor types and tokenizers that load."""
    page = text(DOCS / "models.md")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (as )?`(\w+)` \|", page, re.M)
    assert [(name, None if other else gguf) for name, _, other, gguf in rows] == [
        (family.name, family.gguf) for family in FAMILIES
    ]
    assert f"Tensor types: {', '.join(f'`{one}`' for one in BLOCKS)}." in page
    assert f"Data types: {', '.join(f'`{one}`' for one in DTYPES)}." in page
    assert f"`rope_type` is one of {', '.join(f'`{one}`' for one in ROPE_TYPES)}." in page
    assert not [one for one in (*PRE_TOKENIZERS, *MODELS) if f"`{one}`" not in page]


def test_the_family_that_is_shown_is_the_code():
    """The code shown in docs/models.md is in the source."""
    blocks = re.findall(r"```python\n(.*?)```", text(DOCS / "models.md"), re.S)
    code = text(ROOT / "src" / "memserve" / "engine" / "families.py")
    assert len(blocks) == 2
    assert not [block for block in blocks if block not in code]


def test_only_one_file_knows_the_families():
    """Names of model families appear in one file of the engine only."""
    names = {family.name for family in FAMILIES}
    elsewhere = {
        path.name
        for path in (ROOT / "src").rglob("*.py")
        if re.search("|".join(f"[\"']{name}[\"']" for name in names), path.read_text())
    }
    # Tokenizers and ways of writing calls have the same names.
    assert elsewhere <= {"families.py", "gguf_tokenizer.py", "call_formats.py", "sections.py"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path):
    """Every shipped configuration loads and begins with a comment on its purpose."""
    loaded = configfile.load(str(path))
    assert loaded.worker
    assert path.read_text().startswith("# "), "it must say what it is for"


def test_the_readme_names_the_commands_that_exist():
    """The make targets that the README names exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", text(ROOT / "README.md")))
    assert {"up", "check"} <= named <= targets


def choices(hint: object) -> list[object]:
    """The values of a Literal type, or of an optional one."""
    return [value for one in get_args(hint) for value in (get_args(one) or [one])]


def loadgen_rows(command: str) -> list[str]:
    """The lines about a command's own options that docs/benchmarking.md must have."""
    rows = []
    for argument in loadgen_cli.app[command].assemble_argument_collection():
        names = [name for name in argument.names if name.startswith("--") and not name.startswith("--no-")]
        if names and argument.parameter.help:
            negative = "".join(f", `{name}`" for name in argument.names if name.startswith("--no-"))
            default = argument.field_info.default
            unset = default is False or default is inspect.Parameter.empty or default in (None, "", ())
            shown = "" if unset else "on" if default is True else f"`{default}`"
            words = [one for one in choices(argument.hint) if isinstance(one, str)]
            may_be = f" ({', '.join(f'`{one}`' for one in words)})" if words else ""
            rows.append(f"| `{names[0]}`{negative}{may_be} | {shown} | {argument.parameter.help} |")
    return rows


def test_every_option_of_the_load_generator_is_documented_as_it_is():
    """docs/benchmarking.md has each option of the load generator with its default and meaning."""
    page = text(DOCS / "benchmarking.md").splitlines()
    for command in ("run", "sweep", "compare", "report"):
        assert f"## `memserve-loadgen {command}`" in page
        missing = [row for row in loadgen_rows(command) if row not in page]
        assert not missing, "expected these lines:\n" + "\n".join(missing)


def test_every_workload_of_the_load_generator_is_documented():
    """docs/benchmarking.md has every workload and file format."""
    page = text(DOCS / "benchmarking.md")
    kinds = get_args(loadgen_options.Kind)
    assert not [kind for kind in kinds if f"| `{kind}` |" not in page]
    formats = [one for known in build.FORMATS.values() for one in known]
    assert not [one.name for one in formats if f"| {one.name} |" not in page]


def test_every_documented_command_of_the_load_generator_is_understood():
    """The example commands in docs/benchmarking.md parse."""
    examples = re.findall(r"^memserve-loadgen .+?(?<!\\)$", text(DOCS / "benchmarking.md"), re.M | re.S)
    assert len(examples) >= 8
    for example in examples:
        words = shlex.split(example.replace("\\\n", " "), comments=True)[1:]
        loadgen_cli.app.parse_args(words, exit_on_error=False, print_error=False)
