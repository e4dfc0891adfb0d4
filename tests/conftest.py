"""How tests run: one thread each, a cache of their own, and which of them are quick; fixtures that several share."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import pytest
import torch

from dino.machine import count_cores
from helpers import GOLDEN, draw_images

HERE = Path(__file__).parent

if tests_at_once := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Threads that wait for a core which another test keeps busy make both slow; so do those of the commands tests start.
    os.environ["OMP_NUM_THREADS"] = str(max(1, count_cores() // int(tests_at_once)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out tests marked slow and those that start processes")
    parser.addoption(
        "--machines", action="store_true", help="also what takes many minutes: Slurm, torchrun's agents, networks"
    )


def starts_processes(function: Any, seen: set[CodeType]) -> bool:
    """Whether a test's function, or one of the tests' own functions that it calls, speaks of processes."""
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names |= {*code.co_names}
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    if {"processes", "subprocess"} & names:
        return True
    seen.add(function.__code__)
    called = [inspect.unwrap(f) for name in names if isinstance(f := function.__globals__.get(name), FunctionType)]
    ours = [f for f in called if Path(f.__code__.co_filename).parent == HERE]
    return any(starts_processes(f, seen) for f in ours if f.__code__ not in seen)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("machines"):
        for item in (item for item in items if item.get_closest_marker("machines")):
            item.add_marker(pytest.mark.skip(reason="takes many minutes; run with --machines"))
    if not config.getoption("quick"):
        return
    chosen = []
    for item in items:
        assert isinstance(item, pytest.Function)
        fixtures = [f.func for each in item._fixtureinfo.name2fixturedefs.values() for f in each]
        functions = [f for f in [item.function, *fixtures] if isinstance(f, FunctionType)]
        if not item.get_closest_marker("slow") and not any(starts_processes(f, set()) for f in functions):
            chosen.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Nothing is read from or left in the cache of whoever runs the tests."""
    os.environ["DINO_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def golden():
    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(GOLDEN / f"{name}.npz") as file:
            return dict(file)

    return load


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    """A folder with an untrained ViT of 32 pixels and patches of 8."""
    import dino
    from dino import weights

    folder, arguments = tmp_path_factory.mktemp("model"), {"arch": "vit_nano", "patch_size": 8, "image_size": 32}
    torch.manual_seed(0)
    weights.save(folder, dino.create(**arguments), arguments)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return draw_images(tmp_path / "photos")
