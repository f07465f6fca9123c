"""Reads TOML and ``--set`` overrides into a :class:`~memserve.config.Config`, with all mistakes at once."""

from __future__ import annotations

import difflib
import json
import sys
import tomllib
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import (
    ClassValidationError,
    ForbiddenExtraKeysError,
    IterableValidationError,
    IterableValidationNote,
)
from cattrs.gen import make_dict_structure_fn, override

from memserve.config import Config, section_types
from memserve.errors import ConfigError
from memserve.settings.cross_checks import Problem, Tree, cross_check, default_tables, nearest, show, tables
from memserve.settings.rules import RuleError, expanded


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration: a TOML file, or a shipped one by name (``demo``), with ``key=value`` overrides.

    Raises ConfigError with every problem found, one per line.
    """
    file = find(path)
    tree = parse(file)
    origins, problems = apply_overrides(tree, overrides)
    fill_in(tree)
    config, wrong = structure(tree)
    problems += wrong + cross_check(tree)
    if problems:
        located = (attrs.evolve(p, source=p.source or origin_of(p.path, origins)) for p in problems)
        raise ConfigError("\n".join(dict.fromkeys(problem.line(str(file)) for problem in located)))
    assert config is not None
    return config


# ---- the file ------------------------------------------------------------------------------------------------


def shipped() -> dict[str, Path]:
    """The configurations that come with memserve, by name: in the wheel, or in a checkout's ``configs/``."""
    package = Path(__file__).parents[1]
    for folder in (package / "configs", package.parents[1] / "configs"):
        if files := sorted(folder.glob("*.toml")):
            return {file.stem: file for file in files}
    return {}


def find(path: str) -> Path:
    """The file that the user means by ``path``. Raises ConfigError when there is none."""
    file = expanded(path, "--config")
    if file.is_file():
        return file
    names = shipped()
    if path in names:
        return names[path]
    if file.is_dir():
        raise ConfigError(f"{path}: is a directory; give a TOML file in it")
    near = f"; did you mean {guess}?" if (guess := nearest(path, list(names))) else ""
    known = (
        f"shipped with memserve: {', '.join(names)}" if names else "none is shipped with this installation"
    )
    raise ConfigError(f"{path}: there is no such file{near} ({known})")


def parse(file: Path) -> Tree:
    """The tables of a TOML file. Raises ConfigError, with line and column where the syntax is wrong."""
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 text, at byte {error.start}") from error
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


def fill_in(tree: Tree) -> None:
    """Add values that follow from other keys: a worker without a shard gets the only shard."""
    tree.setdefault("worker", default_tables("worker"))
    names = [shard.get("name") for shard in tables(tree, "shard") or default_tables("shard")]
    if len(names) == 1 and isinstance(names[0], str):
        for worker in tables(tree, "worker"):
            worker.setdefault("shard", names[0])


# ---- overrides -----------------------------------------------------------------------------------------------


def apply_overrides(tree: Tree, overrides: Sequence[str]) -> tuple[dict[str, str], list[Problem]]:
    """Write each ``a.b=value`` into ``tree``; the override behind each written path, and the problems."""
    origins: dict[str, str] = {}
    problems: list[Problem] = []
    for override_ in overrides:
        key, equals, value = override_.partition("=")
        source = f"--set {key}"
        if not equals or not all(key.split(".")):
            problems.append(Problem(key, "must be written KEY=VALUE, such as frontend.port=8123", source))
            continue
        try:
            origins[put(tree, key.strip().split("."), toml_value(value.strip()))] = source
        except RuleError as error:
            problems.append(Problem(key, str(error), source))
    return origins, problems


def toml_value(text: str) -> Any:
    """``text`` as a TOML value, or as a string if it is not one: --set values need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if len(parsed) == 1 else text


def put(tree: Tree, keys: list[str], value: Any) -> str:
    """Set one value; its path as errors show it. Raises RuleError when the keys do not lead to a value."""
    if keys[0] in ("shard", "worker") and keys[0] not in tree:
        tree[keys[0]] = default_tables(keys[0])
    here: Any = tree
    path = ""
    for depth, key in enumerate(keys):
        at: str | int = key
        if isinstance(here, list):
            at = element(here, keys[depth - 1], key)
        elif not isinstance(here, dict):
            raise RuleError(f"name a key: {path} is not a table")
        path += f"[{at}]" if isinstance(at, int) else f".{at}" if path else at
        if depth == len(keys) - 1:
            here[at] = value
        elif isinstance(at, str):
            here = here.setdefault(at, {})
        else:
            here = here[at]
    return path


def element(array: list[Any], section: str, key: str) -> int:
    """The position in ``array`` that an index or a table's name refers to. Raises RuleError."""
    names = [each.get("name") for each in array if isinstance(each, dict)]
    if key in names:
        return names.index(key)
    if key.isdecimal() and int(key) < len(array):
        return int(key)
    raise RuleError(
        f"name a {section} by name ({', '.join(map(str, names))}) or number (0 to {len(array) - 1})"
    )


def origin_of(path: str, origins: dict[str, str]) -> str:
    """The override that wrote ``path``, a table around it or a key in it; empty if none did."""
    for written, source in origins.items():
        within = path.startswith(written) and path[len(written) :][:1] in ("", ".", "[")
        if within or written.startswith(f"{path}."):
            return source
    return ""


# ---- from tables to classes ----------------------------------------------------------------------------------


def structure(tree: Tree) -> tuple[Config | None, list[Problem]]:
    """The configuration, or a problem for every key and value that does not fit."""
    try:
        return _converter.structure(tree, Config), []
    except ClassValidationError as error:
        return None, [explain(path, cause, tree) for path, cause in leaves(error, ())]


def _strict(kind: type, rule: str) -> Callable[[Any, Any], Any]:
    def hook(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise RuleError(rule)
        return value

    return hook


def _number(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise RuleError("be a number")
    if not abs(value) <= sys.float_info.max:  # NaN, infinity, or a whole number that is too large for a float
        raise RuleError(f"be a finite number below {sys.float_info.max:.4g}")
    return float(value)


def _table(cls: type[attrs.AttrsInstance]) -> Callable[[Any, Any], Any]:
    """The cattrs hook for one settings class.

    It applies each field's own parser and rule, so that all of them report.
    """
    attrs.resolve_types(cls)
    fields: Any = {field.name: override(struct_hook=_field(field)) for field in attrs.fields(cls)}
    build: Any = make_dict_structure_fn(cls, _converter, _cattrs_forbid_extra_keys=True, **fields)

    def hook(value: Any, kind: Any) -> Any:
        if not isinstance(value, dict):
            raise RuleError("be a table")
        return build(value, kind)

    return hook


def _field(field: attrs.Attribute[Any]) -> Callable[[Any, Any], Any]:
    parse, check = field.metadata["parse"], field.validator

    def hook(value: Any, kind: Any) -> Any:
        value = _converter.structure(parse(value) if parse else value, kind)
        if check is not None:
            check(None, field, value)
        return value

    return hook


def _array(kind: Any) -> Callable[[Any, Any], Any]:
    strings = get_args(kind)[0] is str
    as_list: Any = types.GenericAlias(list, get_args(kind)[:1])
    inner = _converter.get_structure_hook(as_list)
    what = "strings" if strings else "tables: write its name in double brackets"

    def hook(value: Any, _: Any) -> Any:
        if not isinstance(value, list):
            raise RuleError(f"be an array of {what}")
        if not (value or strings):
            raise RuleError("hold at least one table")
        return tuple(inner(value, as_list))

    return hook


def _is_array(kind: Any) -> bool:
    return get_origin(kind) is tuple


_converter = cattrs.Converter(forbid_extra_keys=True)
_converter.register_structure_hook(int, _strict(int, "be a whole number"))
_converter.register_structure_hook(str, _strict(str, "be a string"))
_converter.register_structure_hook(bool, _strict(bool, "be true or false"))
_converter.register_structure_hook(float, _number)
_converter.register_structure_hook_factory(attrs.has, _table)
_converter.register_structure_hook_factory(_is_array, _array)

# ---- from exceptions to lines --------------------------------------------------------------------------------

Path_ = tuple[str | int, ...]


def leaves(error: Exception, path: Path_) -> Iterator[tuple[Path_, Exception]]:
    """Every single mistake in cattrs' nested groups, with the path to it."""
    if not isinstance(error, ClassValidationError | IterableValidationError):
        yield path, error
        return
    noted, others = error.group_exceptions()
    for cause, note in noted:
        yield from leaves(
            cause, (*path, note.index if isinstance(note, IterableValidationNote) else note.name)
        )
    for cause in others:
        if isinstance(cause, ForbiddenExtraKeysError):
            for key in sorted(cause.extra_fields):
                yield (*path, key), cause
        else:
            yield from leaves(cause, path)


def explain(path: Path_, cause: Exception, tree: Tree) -> Problem:
    """One mistake in words."""
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    value = look_up(tree, path)
    if isinstance(cause, ForbiddenExtraKeysError):
        shown = "hidden" if may_be_secret(path, value) else show(value)
        return Problem(where, f"is not a known key (value {shown}){suggest_key(str(path[-1]), cause.cl)}")
    if isinstance(cause, KeyError):
        return missing(path)
    if isinstance(cause, RuleError):
        if cause.at is not None:
            where, value = f"{where}[{cause.at}]", value[cause.at]
        guess = nearest(value, cause.known) if isinstance(value, str) else ""
        hint = f"; did you mean {json.dumps(guess)}?" if guess else ""
        return Problem(where, f"{cause}, not {show(value, is_secret(path))}{hint}")
    raise cause


def missing(path: Path_) -> Problem:
    """A required key, or a table that has one, is not there."""
    section, *between = path[:-1] if len(path) > 1 else path
    fields = {field.name: field for field in attrs.fields(section_types()[str(section)])}
    key = str(path[-1]) if len(path) > 1 else next(n for n, f in fields.items() if f.default is attrs.NOTHING)
    where = f"{section}{''.join(f'[{part}]' for part in between)}.{key}"
    return Problem(where, f"is required and missing: {fields[key].metadata['help']}")


def look_up(tree: Any, path: Path_) -> Any:
    """The value at ``path``, or None."""
    for part in path:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def is_secret(path: Path_) -> bool:
    """Whether ``path`` is in a setting whose value must not be shown."""
    names = secret_names(path[0])
    return any(part in names for part in path[1:]) or (len(path) == 1 and bool(names))


def secret_names(section: str | int) -> list[str]:
    """The keys of a section whose values must not be shown."""
    kind = section_types().get(str(section))
    return [field.name for field in attrs.fields(kind) if field.metadata["secret"]] if kind else []


def may_be_secret(path: Path_, value: object) -> bool:
    """Whether an unknown key may be a secret one that was mistyped, or a table with such a key."""
    sections = section_types()
    section = path[0] if path[0] in sections else nearest(str(path[0]), list(sections))
    secrets = [one for name in sections for one in secret_names(name)]
    return not isinstance(value, int | float) and bool(
        secret_names(section) or nearest(str(path[-1]), secrets)
    )


def suggest_key(word: str, cls: type) -> str:
    """A hint: this key in other tables, the nearest one in this table or in others, or all keys of this one."""
    elsewhere: dict[str, list[str]] = {}
    for table, kind in section_types().items():
        for field in attrs.fields(kind):
            elsewhere.setdefault(field.name, []).append(f"{table}.{field.name}")
    names = [field.name for field in attrs.fields(cls)]
    if word not in elsewhere and (guess := nearest(word, names)):
        return f"; did you mean {guess}?"
    if close := difflib.get_close_matches(word, elsewhere, n=1, cutoff=0.8):
        return f"; did you mean {' or '.join(elsewhere[close[0]])}?"
    return f"; known: {', '.join(names)}"
