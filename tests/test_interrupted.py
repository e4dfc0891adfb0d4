"""Runs that are killed, stopped, short of disk or memory: each ends saved, with a true sentence, and goes on to the bit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

import dino
import processes
from dino import weights
from dino.engine.log import read_metrics
from dino.weights.checkpoints import read_newest
from helpers import TINY, assert_same_bits, dino_command, final_state, run_dino, tiny_flags

# Counts what changes files of the run, notes it, and kills the process just before one of these changes.
KILL_BEFORE_A_WRITE = """
import json, os, signal, sys
at, run, notes = int(sys.argv[1]), sys.argv[2], open(sys.argv[3], "a", buffering=1)
count = 0
def watch(event, args):
    global count
    changes = {"os.rename", "os.remove", "os.mkdir", "os.truncate"}
    if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR):
        changes = {"open"}
    if event in changes and run in str(args[0]):
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        notes.write(f"{event} {args[0]}\\n")
import dino.run
from dino.eval.online import OnlineEvaluation
if scores := json.loads(os.environ.get("SCORES", "{}")):
    check = OnlineEvaluation.__call__
    OnlineEvaluation.__call__ = lambda self, method, step: check(self, method, step) | {"knn20_top1": scores[str(step)]}
sys.addaudithook(watch)
from dino.cli import main
sys.exit(main(sys.argv[4:]))
"""


def train_until_write(at: int, run: Path, notes: Path, *arguments: object) -> int:
    command = [sys.executable, "-c", KILL_BEFORE_A_WRITE, at, run, notes, "train", *arguments]
    return processes.run([*map(str, command)]).returncode


def assert_loads_the_newest(run: Path, killed_at: str) -> None:
    """The best and the last teacher are those that the newest checkpoint holds."""
    found = read_newest(run / "checkpoints")
    assert found is not None
    last = {k.removeprefix("teacher.backbone."): v for k, v in found.state["method"].items()}
    for name, teacher in ((run, found.state["best"]["weights"]), (f"{run}:last", last)):
        for key, value in weights.load(name).state_dict().items():
            assert torch.equal(value, teacher[key]), (killed_at, name, key)


def drop_time(run: Path) -> list[dict[str, float]]:
    """The metrics of a run without those that differ from time to time."""
    timed = ("images_per_second", "data_wait_share", "peak_memory_gb")
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_killed_before_any_write_a_run_ends_with_its_own_model(photos, tmp_path, part):
    """SIGKILL between every two writes of the start and of the last save. Readers find the newest model meanwhile."""
    flags = ["--data", photos, *tiny_flags(epochs=2, log__keep=1, log__to=("tensorboard",))]
    whole, notes = tmp_path / "whole", tmp_path / "notes"
    assert train_until_write(-1, whole, notes, *flags, "--out", whole) == 0
    writes = notes.read_text().splitlines()
    saves = [i for i, line in enumerate(writes) if line.startswith("open") and ".pt." in line]
    points = [*range(saves[0] + 1), *range(saves[-1], len(writes))]
    assert len(points) > 25
    for at in points[part::4]:
        run = tmp_path / f"killed-{at}"
        assert train_until_write(at, run, tmp_path / "other", *flags, "--out", run) == -signal.SIGKILL
        if list(run.glob("checkpoints/step-*.pt")):
            assert_loads_the_newest(run, writes[at])
        command = ["--resume", run] if (run / "config.toml").exists() else [*flags, "--out", run]
        done = run_dino("train", *command)
        assert done.returncode == 0, done.stderr
        assert_same_bits(final_state(whole), final_state(run))
        for name in ("teacher.safetensors", "best.safetensors", "config.json", "checkpoints/latest"):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), (writes[at], name)
        assert not list(run.rglob("*.tmp"))
        assert drop_time(run) == drop_time(whole), writes[at]
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.parametrize("scores", [{"0": 9, "5": 4, "10": 3}, {"0": 9, "5": 3, "10": 4}])
def test_killed_before_any_write_of_its_last_save_a_run_serves_its_best(photos, tmp_path, scores, monkeypatch):
    """The best is the step before, or it is this one, and the file holds that before."""
    monkeypatch.setenv("SCORES", json.dumps(scores))
    flags = ["--data", photos, *tiny_flags(epochs=2)]
    whole, run, notes = tmp_path / "whole", tmp_path / "killed", tmp_path / "notes"
    assert train_until_write(-1, whole, notes, *flags, "--out", whole) == 0
    writes = notes.read_text().splitlines()
    assert weights.read(whole, only_backbone=True).step == (5 if scores["5"] > scores["10"] else 10)
    points = [i for i, line in enumerate(writes) if line.startswith("os.rename")][-4:]
    assert (".best.safetensors" in " ".join(writes[at] for at in points)) == (scores["5"] < scores["10"])
    for at in points:
        assert train_until_write(at, run, tmp_path / "other", *flags, "--out", run) == -signal.SIGKILL
        assert_loads_the_newest(run, writes[at])
        assert train_until_write(-1, run, tmp_path / "other", "--resume", run) == 0
        for name in ("teacher.safetensors", "best.safetensors"):
            assert (run / name).read_bytes() == (whole / name).read_bytes(), (writes[at], name)
        shutil.rmtree(run)


def test_a_teacher_that_is_not_of_the_newest_checkpoint_is_never_used(photos, tmp_path, capsys):
    run = dino.train(data=str(photos), out=str(tmp_path / "run"), **TINY | {"epochs": 1})
    teacher = run / "teacher.safetensors"
    (tmp_path / "early").write_bytes(teacher.read_bytes())
    dino.train(data=str(photos), out=str(run), overwrite=True, **TINY | {"epochs": 2})
    right = teacher.read_bytes()
    expected = weights.fingerprint(weights.load(f"{run}:last"))

    def flip() -> None:
        content = bytearray(right)
        content[-5] ^= 1
        teacher.write_bytes(content)

    for harm in (
        lambda: shutil.copy(tmp_path / "early", teacher),
        flip,
        teacher.unlink,
        lambda: teacher.write_bytes(b""),
        (run / "config.json").unlink,
    ):
        harm()
        capsys.readouterr()
        assert weights.fingerprint(weights.load(f"{run}:last")) == expected
        assert "taking step-00000010.pt" in capsys.readouterr().err
        dino.train(resume=run)
        assert teacher.read_bytes() == right


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk, or gives it another size."""
    folder, mounted = tmp_path / "disk", False

    def mount(size: str) -> Path:
        nonlocal mounted
        folder.mkdir(exist_ok=True)
        how = f"remount,size={size}" if mounted else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a small tmpfs needs root")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "12k", "20k", "360k", "420k", "480k", "540k", "800k"])
def test_a_full_disk_is_said_and_mended_by_a_larger_one(photos, tmp_path, disk, size):
    """From no room for anything to no room for the second checkpoint; with metrics, events and teacher between them."""
    flags = ["--data", photos, *tiny_flags(log__every=1, log__to=("tensorboard",))]
    run = disk(size) / "run"
    done = run_dino("train", *flags, "--out", run)
    assert done.returncode in (1, 2)
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("dino: ") == 1
    assert "--debug" not in done.stderr
    disk("20m")
    again = ["--resume", run] if (run / "config.toml").exists() else [*flags, "--out", run]
    done = run_dino("train", *again)
    assert done.returncode == 0, done.stderr
    whole = dino.train(data=str(photos), out=str(tmp_path / "whole"), **TINY | {"log.every": 1})
    assert_same_bits(final_state(whole), final_state(run))
    assert (run / "teacher.safetensors").read_bytes() == (whole / "teacher.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_under_a_sharded_checkpoint_is_said_and_mended(photos, tmp_path, disk, ranks):
    flags = ["--data", photos, *tiny_flags(epochs=2), "--shard", "all"]
    assert run_dino("train", *flags, "--out", tmp_path / "whole", ranks=ranks).returncode == 0
    run = disk("480k") / "run"
    done = run_dino("train", *flags, "--out", run, ranks=ranks)
    assert done.returncode == 1, done.stderr
    assert "could not be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    disk("20m")
    done = run_dino("train", "--resume", run, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert (run / "teacher.safetensors").read_bytes() == (tmp_path / "whole/teacher.safetensors").read_bytes()


def start_long(photos: Path, run: Path, **changes: object) -> subprocess.Popen[str]:
    """A run that would take hours, in a process group of its own, after its first checkpoint."""
    flags = tiny_flags(epochs=20_000, **changes)
    command = dino_command("train", "--data", photos, "--out", run, *flags)
    process = processes.start(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (run / "teacher.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def assert_goes_on(run: Path, stderr: str) -> None:
    assert f"dino train --resume {run}" in stderr
    assert "Traceback" not in stderr
    state = final_state(run)
    done = run_dino("train", "--resume", run, "--stop-after", int(state["step"]) + 1)
    assert done.returncode == 0, done.stderr
    assert f"Resuming after step {int(state['step'])} " in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("names", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGTERM SIGUSR1", "SIGUSR1 SIGTERM"])
def test_a_signal_to_the_whole_group_saves(photos, tmp_path, names):
    """SIGUSR1 is Slurm's, and may come with another."""
    numbers = [signal.Signals[name] for name in names.split()]
    if signal.getsignal(numbers[0]) is signal.SIG_IGN:
        pytest.skip("the tests were started by nohup")
    process = start_long(photos, tmp_path / "run", data__num_workers=2, log__every=1000, log__knn_every=0)
    for number in numbers:
        os.killpg(process.pid, number)
        time.sleep(0.01)  # else the system delivers the one of the smaller number first
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "Stopped and saved after step" in stderr
    assert stderr.count("Finishing this step") == len(numbers)  # workers say nothing
    assert_goes_on(tmp_path / "run", stderr)


@pytest.mark.slow
def test_under_nohup_a_terminal_that_closes_ends_neither_run_nor_workers(photos, tmp_path):
    flags = tiny_flags(epochs=20_000, data__num_workers=2, log__knn_every=0)
    command = ["nohup", *dino_command("train", "--data", photos, "--out", tmp_path / "run", *flags)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "teacher.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGHUP)
    before = int(final_state(tmp_path / "run")["step"])
    while int(final_state(tmp_path / "run")["step"]) < before + 10 and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert_goes_on(tmp_path / "run", stderr)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_dies_ends_the_run_saved(photos, tmp_path, number):
    run = tmp_path / "run"
    process = start_long(photos, run, data__num_workers=2, log__knn_every=0)
    worker = psutil.Process(process.pid).children()[0]
    before = int(final_state(run)["step"])
    worker.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"a data worker was killed by {signal.Signals(number).name}" in stderr
    assert "free some space" not in stderr.lower()
    assert int(final_state(run)["step"]) > before
    assert_goes_on(run, stderr)


@pytest.mark.slow
def test_a_small_shared_memory_is_named(photos, tmp_path):
    run = tmp_path / "run"
    flags = tiny_flags(data__num_workers=1, views__global_size=96, batch_size=20)
    train = subprocess.list2cmdline(dino_command("train", "--data", photos, "--out", run, *flags))
    script = f"mount -t tmpfs -o size=1M tmpfs /dev/shm && exec {train}"
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm needs root")
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "/dev/shm is too small" in done.stderr
    assert "Traceback" not in done.stderr
    assert_same_bits(final_state(dino.train(resume=run, **{"data.num_workers": 0})), final_state(run))


def test_training_in_a_thread(photos, tmp_path):
    """As agents of experiment trackers and web servers call it: Python handles signals in the main thread only."""
    before = signal.getsignal(signal.SIGTERM)
    done: list[Path] = []
    work = lambda: done.append(dino.train(data=str(photos), out=str(tmp_path / "t"), **TINY | {"epochs": 1}))  # noqa: E731
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [tmp_path / "t"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_ranks_that_are_stopped_or_killed_end_with_the_same_bits(photos, tmp_path, number):
    """SIGTERM goes to torchrun, which passes it on; SIGKILL to one rank, after which torchrun ends the other."""
    flags = ["--data", photos, *tiny_flags(epochs=30, log__knn_every=0)]
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = run_dino("train", *flags, "--out", whole, ranks=2)
    assert done.returncode == 0, done.stderr
    command = dino_command("train", *flags, "--out", run)
    process = processes.start(command, ranks=2, real=True, stderr=subprocess.PIPE, text=True)
    while len(read_metrics(run / "metrics.jsonl")) < 5 and process.poll() is None:
        time.sleep(0.05)
    target = process if number == signal.SIGTERM else psutil.Process(process.pid).children()[1]
    with contextlib.suppress(psutil.NoSuchProcess):
        target.send_signal(number)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode != 0
    assert ("Stopped and saved after step" in stderr) == (number == signal.SIGTERM)
    assert final_state(run)["step"] < final_state(whole)["step"]
    done = run_dino("train", "--resume", run, ranks=2)
    assert done.returncode == 0, done.stderr
    assert_same_bits(final_state(whole), final_state(run))


@pytest.mark.slow
def test_memory_is_named_only_where_it_may_be_the_cause(photos, tmp_path):
    for number, said in ((signal.SIGKILL, "memory ran out"), (signal.SIGSEGV, "if nobody stopped it")):
        run = tmp_path / number.name
        process = start_long(photos, run, data__num_workers=1, log__knn_every=0)
        psutil.Process(process.pid).children()[0].send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert f"a data worker was killed by {number.name}; " in stderr
        assert said in stderr
        assert ("memory ran out" in stderr) == (number == signal.SIGKILL)


def test_figures_of_the_untrained_model_are_not_called_trained(photos, tmp_path, capsys):
    dino.train(data=str(photos), out=str(tmp_path / "run"), **TINY | {"stop_after": 1})
    assert "-> " not in capsys.readouterr().err
