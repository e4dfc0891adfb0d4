"""The machine and the terminal: the package imports on any system, and tells results from progress."""

from __future__ import annotations

import ast
import io
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dino
from dino import machine
from dino.engine.build import check_size
from dino.models import Head
from dino.options import replace
from dino.options.train import TrainOptions
from dino.terminal import Terminal, say, track
from helpers import TINY

SOURCES = sorted(Path(dino.__file__).parent.rglob("*.py"))
MODULES = [".".join(("dino", *path.relative_to(Path(dino.__file__).parent).with_suffix("").parts)) for path in SOURCES]

# What others need is imported before: they have their own ways on other systems.
IMPORT_ALL = """
import importlib, sys
others, modules = sys.argv[1:]
for name in others.split():
    importlib.import_module(name)
sys.modules["fcntl"] = sys.modules["resource"] = None

def refuse_proc(event, args):
    if event == "open" and str(args[0]).startswith("/proc"):
        raise PermissionError(args[0])

sys.addaudithook(refuse_proc)
for name in modules.split():
    importlib.import_module(name)
assert "dino.engine.checkpoint" in sys.modules
"""


def imports(tree: ast.AST) -> set[str]:
    """Names of the modules that a module imports as it is imported itself."""
    return {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }


def test_every_module_imports_without_what_only_unix_has():
    others = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assert "fcntl" not in imports(tree), path
        assert "resource" not in imports(tree) or path.name == "machine.py"
        others |= {n for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for n in imports(node)}
    others = {name for name in others if name.split(".")[0] not in ("dino", "")}
    modules = [name.removesuffix(".__init__") for name in MODULES if name != "dino.__main__"]
    command = [sys.executable, "-c", IMPORT_ALL, " ".join(others), " ".join(modules)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_memory_is_counted_in_bytes():
    cpu = torch.device("cpu")
    before = machine.measure_memory_in_use(cpu)
    with mmap.mmap(-1, size := 50_000_000) as block:  # new pages, whatever the allocator keeps
        block.write(b"x" * size)
        now = machine.measure_memory_in_use(cpu)
    assert 0.8 * size < now - before < 3 * size
    assert now <= 1.01 * machine.measure_peak_memory(cpu) < 1e12


def test_the_processor_has_a_name():
    assert f"{torch.get_num_threads()} of " in machine.name_device(torch.device("cpu"))
    assert "\n" not in machine.name_processor()


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_results_go_to_stdout_though_a_bar_is_drawn(monkeypatch):
    """rich would print them above the bar, on stderr, and a file or pipe would not get them."""
    screen, file = Screen(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", file)
    for name in track(["a", "b"], 2, "images"):
        print(f"result {name}")
        say(f"Skipped {name}")
    assert file.getvalue() == "result a\nresult b\n"
    assert "Skipped b" in screen.getvalue()
    assert "images" in screen.getvalue()


def test_without_a_terminal_there_are_only_lines(capsys):
    assert list(track(range(3), None, "images")) == [0, 1, 2]
    terminal = Terminal()
    terminal.start(0, 2)
    terminal.update(1, "epoch 1/2", "loss 1")
    terminal.say("[b]photos:apple:.jpg[/b] is long " + "x" * 200, style="yellow")
    terminal.stop()
    assert not terminal.live
    assert capsys.readouterr().err == "[b]photos:apple:.jpg[/b] is long " + "x" * 200 + "\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_main_rank_speaks(rank, monkeypatch):
    monkeypatch.setattr("dino.distributed.rank", lambda: rank)
    monkeypatch.setattr(sys, "stderr", screen := Screen())
    for _ in track([1], 1, "images"):
        say("a line")
    Terminal().say("another")
    assert bool(screen.getvalue()) == (rank == 0)


SCRIPT = """
import multiprocessing, sys
import dino
from helpers import TINY
{guard}
    multiprocessing.set_start_method(sys.argv[1])
    dino.train(data="photos", out="run", **TINY | {{"epochs": 1, "data.num_workers": 1}})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "guarded"), [("spawn", False), ("forkserver", False), ("forkserver", True)])
def test_a_script_that_workers_would_run_again_is_told_how_to_be_written(photos, tmp_path, method, guarded):
    guard = 'if __name__ == "__main__":' if guarded else "if True:"
    (script := tmp_path / "script.py").write_text(SCRIPT.format(guard=guard))
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command, environment = [sys.executable, str(script), method], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if guarded:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "run" / "teacher.safetensors").is_file()
    else:
        last = done.stderr.splitlines()[-1]
        assert last.startswith(
            f"ValueError: {script} would run again in each worker process; put its work under `if __name_"
        )
        assert done.stderr.count("Traceback") == 1
        assert not (tmp_path / "run").exists()


def test_what_the_machine_has_not_is_refused_before_it_is_taken():
    cores = machine.count_cores()
    # Scores of so many prototypes take more memory than their weights.
    large = replace(TrainOptions(), TINY | {"head.out_dim": 2**24, "head.bottleneck_dim": 1})
    for call, said in (
        (lambda: machine.check_cores("threads", cores + 1, 1), f"threads is {cores + 1}, .* use at most {cores}"),
        (lambda: machine.check_workers(10**6), "num_workers is 1000000"),
        (lambda: dino.create("vit_small", width=60_000, depth=900), r"would take [\d,]{6,} GB"),
        (lambda: check_size(large, 6400, False), r"training this model on 6400 images at a time would take \d,"),
        (lambda: Head(96, out_dim=10**9, bottleneck_dim=60_000), r"would take [\d,]{6,} GB"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
