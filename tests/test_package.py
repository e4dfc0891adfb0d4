"""The wheel and the source archive, installed alone: everything that dino needs of itself is in them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import dino

ROOT = Path(__file__).parents[1]


def call(*command: object, **variables: str) -> str:
    words, env = [*map(str, command)], os.environ | variables
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    call(sys.executable, "-m", "hatchling", "build", "--directory", out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_an_installed_package_works(built, tmp_path, kind):
    """Other libraries are those of this environment, where dino itself is only a link to its sources."""
    (package,) = built.glob(kind)
    assert package.name.startswith(f"dino_vision-{dino.__version__}")
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    libraries = {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", package, **libraries)
    where = call(python, "-c", "import dino; print(dino.__file__)", **libraries)
    assert Path(where.strip()).is_relative_to(tmp_path / "env")
    command = tmp_path / "env" / "bin" / "dino"
    assert call(command, "--version", **libraries) == f"dino {dino.__version__}\n"
    if kind == "*.whl":
        flags = ["--data", "scenes:32", "--epochs", "1", "--batch-size", "8", "--out", tmp_path / "run"]
        call(command, "train", *flags, **libraries)
        assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
