"""The wheel: what is in it, and that it runs outside of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("src", "loadgen", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the checkout, so that nothing is written into it."""
    place = tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        part = ROOT / name
        (shutil.copytree if part.is_dir() else shutil.copy)(part, place / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    built = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (place / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_module_configuration_and_kernel(wheel):
    """The wheel has every module, configuration and native source, and no compiled files or tests."""
    held = set(wheel.namelist())
    package = ROOT / "src" / "memserve"
    wanted = {
        f"memserve/{path.relative_to(package)}"
        for kind in ("*.py", "*.cpp", "*.hpp")
        for path in package.rglob(kind)
    }
    wanted |= {
        str(path.relative_to(ROOT))
        for path in (ROOT / "loadgen").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    wanted |= {f"memserve/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")}
    assert wanted <= held
    assert "memserve/py.typed" in held
    assert not [name for name in held if name.endswith((".pyc", ".so")) or name.startswith("tests/")]


def test_the_wheel_names_its_licence_and_command(wheel):
    """The wheel names its licence, Python version and commands."""
    held = {name.rpartition("/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = wheel.read(held["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "LICENSE" in held
    commands = wheel.read(held["entry_points.txt"]).decode()
    assert "memserve = memserve.__main__:main" in commands
    assert "memserve-loadgen = loadgen.__main__:main" in commands


def test_the_wheel_runs_outside_of_the_checkout(wheel, tmp_path):
    """memserve runs from the wheel, with its configurations, outside of the checkout."""
    wheel.extractall(tmp_path / "installed")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); from memserve import __main__; from memserve.settings import configfile;"
    code += "print(__main__.__file__, configfile.load('demo').worker[0].name, configfile.load('2p2d').worker[3].name)"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    place, first, last = done.stdout.split()
    assert Path(place).is_relative_to(tmp_path)
    assert (first, last) == ("p0", "d1")


def test_the_load_generator_runs_outside_of_the_checkout(wheel, tmp_path):
    """The load generator runs from the wheel outside of the checkout."""
    wheel.extractall(tmp_path / "installed")
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); sys.argv = ['loadgen', 'run', '--help'];"
    code += "import loadgen.__main__ as it; print(it.__file__); sys.exit(it.main())"
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.splitlines()[0]).is_relative_to(tmp_path)
    assert "--rate" in done.stdout
