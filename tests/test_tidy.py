"""Rules of this project that no linter knows: which module may import which, what is banned, and how long things may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "memserve"
MODULES = {
    str(path.relative_to(SOURCE).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
TESTS = sorted((ROOT / "tests").glob("*.py"))
LOADGEN = sorted((ROOT / "loadgen").rglob("*.py"))
LOADGEN_CORES = {
    "answer", "arrivals", "compare", "content", "conversation", "generated", "measures", "wire", "workload", "chat", "longdoc",
    "agent", "traces",
}  # fmt: skip

LAYERS = {
    "words": (
        "__init__",
        "errors",
        "accounts",
        "panics",
        "percentiles",
        "identity",
        "costs",
        "drawing",
        "tokens",
        "scopes",
        "messages",
        "pool_messages",
        "transfer_messages",
        "actions",
        "engine",
        "engine.plans",
    ),
    "cores": (
        "engine.worker",
        "engine.sequence",
        "engine.batching",
        "engine.drafting",
        "engine.ended",
        "engine.following",
        "engine.load",
        "engine.outbox",
        "engine.paging",
        "engine.steps",
        "mempool*",
        "scheduling*",
        "transfer.values",
        "transfer.actions",
        "transfer.outgoing",
        "transfer.incoming",
        "core",
        "presence",
        "journal",
        "journal_entry",
    ),
    "settings": (
        "config",
        "accepting",
        "settings*",
        "observe",
        "processes.lifecycle",
        "processes.place",
        "engine.spec",
        "engine.gguf",
        "engine.gguf_spec",
        "engine.hf",
        "engine.rope_scaling",
        "engine.safetensors",
        "engine.families",
        "engine.checkpoint",
    ),
    "engine": ("engine.*", "kernels*"),
    "links": ("bus", "api*", "transfer*", "client*"),
    "process": ("processes.actor", "processes.lifeline"),
    "sim": ("sim", "sim.*"),
    "actors": ("actors*",),
    "top": (
        "__main__",
        "cli",
        "commands*",
        "inspect",
        "processes*",
        "supervisor",
    ),
}
"""A module is in the first layer that has a matching pattern."""

MAY_IMPORT = {
    "words": {"words"},
    "cores": {"words", "cores"},
    "settings": {"words", "settings"},
    "engine": {"words", "cores", "settings", "engine"},
    "links": {"words", "cores", "settings", "engine", "links"},
    "process": {"words", "settings", "engine", "process"},
    "sim": {"words", "cores", "settings", "sim"},
    "actors": {"words", "cores", "settings", "engine", "links", "process", "actors"},
    "top": {"words", "cores", "settings", "engine", "links", "process", "sim", "top"},
}

IMPURE = {
    "asyncio", "datetime", "io", "logging", "multiprocessing", "numpy", "os", "random", "secrets", "signal", "socket",
    "structlog", "subprocess", "threading", "time", "torch", "trio", "uuid", "zmq",
}  # fmt: skip
"""A core that imports one of these cannot be replayed under a virtual clock."""

MAY_IMPORT_TORCH = {
    "engine.adjusting",
    "engine.model",
    "engine.ops",
    "engine.cuda",
    "engine.gpu_draws",
    "engine.gpu_launch",
    "engine.sampling",
    "engine.torch_step",
    "engine.prompt_logprobs",
    "engine.weights",
}
MAY_IMPORT_GPU = {
    "kernels.gpu_memory": {"cupy"},
    "kernels.flashinfer_kit": {"flashinfer"},
}
"""cupy and flashinfer are optional, and importing them can make a CUDA context: nothing else may."""
MAY_PRINT = {"cli", "commands.show", "processes.keeping", "processes.actor", "__main__"}
FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 450
DISTRIBUTIONS = {"zmq": "pyzmq", "cupy": "cupy-cuda13x", "flashinfer": "flashinfer-python"}
"""Import names that differ from the name of their package."""


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(), str(path))


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file imports anywhere, outside of ``if TYPE_CHECKING``."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    only_types = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree(path)):
        if id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> Iterator[str]:
    """The modules of memserve that a file imports, by their names within it."""
    for name in imports(path):
        if name.partition(".")[0] == "memserve":
            inner = name.removeprefix("memserve").removeprefix(".")
            while inner and inner not in MODULES:
                inner = inner.rpartition(".")[0]
            yield inner or "__init__"


def layer(module: str) -> str:
    """The layer of a module; a new module must be added to one."""
    for name, patterns in LAYERS.items():
        if any(fnmatch(module, pattern) for pattern in patterns):
            return name
    raise AssertionError(f"memserve.{module} is in no layer: add it to LAYERS")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    """A module imports only from the layers that its own layer may use: the simulator runs cores without sockets."""
    allowed = MAY_IMPORT[layer(module)]
    wrong = {name for name in own_imports(MODULES[module]) if layer(name) not in allowed}
    assert not wrong, f"{module} ({layer(module)}) may import {sorted(allowed)} only"


def test_no_modules_need_one_another():
    """No modules import one another in a circle; CycleError names the circle."""
    TopologicalSorter({name: {*own_imports(path)} - {name} for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("module", [name for name in MODULES if layer(name) in ("words", "cores")])
def test_cores_are_pure(module):
    """Cores import no clock, randomness or I/O, so that their tests and the simulator are reproducible."""
    used = {name.partition(".")[0] for name in imports(MODULES[module])}
    assert not used & IMPURE - ({"sys"} if module == "tokens" else set())


def test_the_cores_of_the_load_generator_are_pure():
    """The load generator's cores import no clock or socket and use only seeded randomness."""
    cores = [path for path in LOADGEN if path.stem in LOADGEN_CORES]
    assert len(cores) == len(LOADGEN_CORES)
    for path in cores:
        used = {name.partition(".")[0] for name in imports(path)}
        # NumPy's generators are seeded, and `datetime` reads time stamps of files.
        assert not used & IMPURE - {"numpy", "datetime"}, path
        assert "default_rng()" not in path.read_text(), path


def test_torch_stays_in_the_engine():
    """Only listed modules of the engine, and kernels, import torch: it costs 200 MiB and seconds at the start."""
    found = {
        name for name, path in MODULES.items() if any(one.split(".")[0] == "torch" for one in imports(path))
    }
    assert {name for name in found if not name.startswith("kernels")} <= MAY_IMPORT_TORCH


def test_processes_without_a_model_do_not_load_torch():
    """Actors without a model, and workers with the native step, start without torch: it takes 190 MiB and a second."""
    imports = "from memserve import supervisor; from memserve.actors import frontend, global_scheduler, mempool_shard"
    workers = "from memserve.actors import worker; from memserve.engine import calibration, cpu_budget, grammars, runner"
    code = f"import sys; {imports}; {workers}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "src"
    )
    assert done.stdout.strip() == "False"


def test_gpu_libraries_stay_in_the_gpu_backend():
    """Only the GPU backend imports cupy and flashinfer, and not at module level: most machines do not have them."""
    for module, path in MODULES.items():
        used = {name.partition(".")[0] for name in imports(path)} & {"cupy", "flashinfer"}
        assert used <= MAY_IMPORT_GPU.get(module, set()), module
        at_once = {
            name.name for node in tree(path).body if isinstance(node, ast.Import) for name in node.names
        }
        assert not {name.partition(".")[0] for name in at_once} & {"cupy", "flashinfer"}, module


def test_nothing_is_ever_pickled():
    """Nothing uses pickle or its like: a message or a file could run code."""
    banned = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}
    calls = re.compile(r"send_pyobj|recv_pyobj|allow_pickle|weights_only=False|torch\.load\(")
    for path in [*MODULES.values(), *LOADGEN]:
        assert not {name.partition(".")[0] for name in imports(path)} & banned, path
        assert not calls.search(path.read_text()), path


def test_only_commands_print():
    """Only commands and the start of processes call print."""
    for module, path in MODULES.items():
        if module not in MAY_PRINT:
            called = {
                node.func.id
                for node in ast.walk(tree(path))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            }
            assert not called & {"print", "breakpoint"}, path


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_and_files_stay_short():
    """Functions and files stay within the length limits."""
    long_functions = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in [*MODULES.values(), *LOADGEN, *TESTS]
        for node in functions(path)
        if node.end_lineno - node.lineno >= FUNCTION_LINES_MAX
    ]
    assert not long_functions
    lengths = {path: len(path.read_text().splitlines()) for path in [*MODULES.values(), *LOADGEN, *TESTS]}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > FILE_LINES_MAX}


def test_public_things_have_docstrings():
    """Public modules, classes, functions and methods have docstrings."""
    explained = set(protocol_methods())
    missing = [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
        for path in [*MODULES.values(), *LOADGEN]
        for node in public(tree(path))
        if not ast.get_docstring(node) and getattr(node, "name", "") not in explained
    ]
    assert not missing


def protocol_methods() -> Iterator[str]:
    """Methods that a Protocol explains for all of its implementations."""
    for path in MODULES.values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases):
                yield from (method.name for method in functions_in(node) if ast.get_docstring(method))


def public(
    part: ast.Module | ast.ClassDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """The parts that must have docstrings: a module with anything in it, and its public classes, functions and methods.

    Methods of a class with a base are left out: the base explains them.
    """
    if part.body:
        yield part
    yield from (
        node for node in functions_in(part) if not node.name.startswith("_") and not is_overload(node)
    )
    for node in part.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from [node] if node.bases else public(node)


def functions_in(part: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions that are defined directly in a module or class."""
    yield from (node for node in part.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def is_overload(node: ast.AST) -> bool:
    """Whether a function only repeats another's signature."""
    return any("overload" in ast.unparse(one) for one in getattr(node, "decorator_list", ()))


def test_every_test_has_a_docstring():
    """Every test has a docstring that says what it checks."""
    silent = [
        f"{path.name}:{node.lineno} {node.name}"
        for path in TESTS
        for node in functions(path)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert not silent


def files() -> list[Path]:
    """Every file that is, or would be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_place_on_somebodys_machine():
    """No file contains a path of the machine that it was written on."""
    places = re.compile(rb"(?<![\w.}])/(" + rb"|".join((b"home", b"root", b"Users", b"work")) + rb")/[\w.-]")
    found = [str(path.relative_to(ROOT)) for path in files() if places.search(path.read_bytes())]
    assert not found


def test_nothing_is_left_for_later():
    """No file has a comment that marks unfinished work."""
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    assert not [
        str(path)
        for path in files()
        if path.suffix in (".py", ".toml", ".md", ".cpp") and words.search(path.read_text())
    ]


# ---- dependencies --------------------------------------------------------------------------------------------


def project() -> dict:
    """pyproject.toml's [project] table."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    """The bare names of requirements."""
    return {re.match(r"[A-Za-z0-9-]+", one)[0].lower() for one in requirements}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    """The declared dependencies are exactly the packages that are imported."""
    used = {name.partition(".")[0] for path in MODULES.values() for name in imports(path)}
    foreign = used - set(sys.stdlib_module_names) - {"memserve"}
    optional = project()["optional-dependencies"]
    extras = names(optional["cuda"]) | names(optional["multihost"])
    assert {DISTRIBUTIONS.get(name, name) for name in foreign} - extras == names(project()["dependencies"])


def test_what_the_load_generator_imports_is_declared():
    """The ``loadgen`` extra has everything that the load generator imports beyond the dependencies of memserve."""
    used = {name.partition(".")[0] for path in LOADGEN for name in imports(path)}
    foreign = used - set(sys.stdlib_module_names) - {"memserve", "loadgen"}
    given = project()
    extra = names(given["optional-dependencies"]["loadgen"])
    assert foreign <= names(given["dependencies"]) | extra
    assert extra <= foreign & names(given["optional-dependencies"]["test"])


def test_every_dependency_is_pinned_for_installation():
    """constraints.txt pins every dependency, so that two installations of one commit are alike."""
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pinned = {name.replace("_", "-") for name in pins}
    assert names(project()["dependencies"]) | names(project()["optional-dependencies"]["test"]) <= pinned
    assert pins["torch"] == "2.13.0"


def test_the_version_is_the_same_everywhere():
    """The version in pyproject.toml is that of the package."""
    from memserve import __version__

    assert project()["version"] == __version__
