"""The engine end to end: real runs through the real command line, interrupted, resumed, spread over ranks."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dino
import processes
from dino.engine.log import read_metrics
from helpers import TINY, assert_same_bits, dino_command, draw_images, final_state, run_dino, tiny_flags


def test_a_bare_folder_becomes_a_model_and_metrics(photos, tmp_path):
    done = run_dino("train", "--data", photos, "--out", tmp_path / "run", *tiny_flags())
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {"config.toml", "metrics.jsonl", "checkpoints", "teacher.safetensors"}
    lines = read_metrics(run / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["step"] == 3 * (22 // 4)
    for line in steps:
        assert line["kl"] == pytest.approx(line["loss"] - line["teacher_entropy"])
        assert 0 <= line["data_wait_share"] <= 1
    assert all(math.isfinite(v) for line in lines for v in line.values())
    measured = [line for line in lines if "effective_rank" in line]
    assert measured[0]["step"] == 0
    assert measured[-1]["step"] == steps[-1]["step"]
    assert "knn10_top1" in measured[-1]
    model = dino.load(run)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 32)


def test_flat_unlabeled_folder(tmp_path):
    draw_images(tmp_path / "nested", classes=1)
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (tmp_path / "nested").rglob("*.jpg"):
        path.rename(flat / path.name)
    run = dino.train(TRAIN, data=str(flat), out=str(tmp_path / "run"), epochs=1)
    measured = [line for line in read_metrics(run / "metrics.jsonl") if "effective_rank" in line]
    assert measured
    assert not any(key.startswith("knn") for key in measured[-1])


def options(**changes):
    from dino.options import replace
    from dino.options.train import TrainOptions

    return replace(TrainOptions(), TINY | {k.replace("__", "."): v for k, v in changes.items()})


TRAIN = options()


def test_config_toml_repeats_the_run(photos, tmp_path):
    dino.train(TRAIN, data=str(photos), out=str(tmp_path / "a"))
    done = run_dino("train", tmp_path / "a" / "config.toml", "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert_same_bits(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


def test_checks_come_as_often_as_asked_whatever_the_log_interval(photos, tmp_path):
    changes = {"log.knn_every": 0.6, "log.every": 4}  # 5 steps an epoch: a check every 3 steps, a log line every 4
    run = dino.train(TRAIN, data=str(photos), out=str(tmp_path / "run"), **changes)
    measured = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "effective_rank" in line]
    assert measured == [0, 3, 6, 9, 12, 15]


def test_workers_change_nothing(photos, tmp_path):
    for workers in (0, 2):
        changes = {"data.num_workers": workers}
        dino.train(TRAIN, data=str(photos), out=str(tmp_path / f"w{workers}"), epochs=1, **changes)
    assert_same_bits(final_state(tmp_path / "w0"), final_state(tmp_path / "w2"))


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 5, 7])
def test_resume_is_exact_also_within_an_epoch(photos, tmp_path, at):
    chosen = options(model__drop_path=0.2)  # its randomness must resume too
    whole = dino.train(chosen, data=str(photos), out=str(tmp_path / "whole"))
    part = dino.train(chosen, data=str(photos), out=str(tmp_path / "part"), stop_after=at)
    dino.train(resume=part, stop_after=1000)
    assert_same_bits(final_state(whole), final_state(part))
    drop_time = lambda line: {  # noqa: E731
        k: v for k, v in line.items() if k not in ("images_per_second", "data_wait_share", "peak_memory_gb")
    }
    a, b = ([drop_time(x) for x in read_metrics(run / "metrics.jsonl")] for run in (whole, part))
    assert a[-1] == b[-1]


@pytest.mark.slow
def test_killed_at_random_moments_ends_with_the_same_bits(photos, tmp_path):
    """SIGKILL at 10 random moments of the real command; the weights equal the uninterrupted run's bit for bit."""
    flags = tiny_flags(epochs=40, log__every=1, log__checkpoint_minutes=1e-4, model__drop_path=0.1)
    whole = run_dino("train", "--data", photos, "--out", tmp_path / "whole", *flags)
    assert whole.returncode == 0, whole.stderr
    rng, killed, run = random.Random(0), 0, tmp_path / "killed"
    command = dino_command("train", "--data", photos, "--out", run, *flags)
    for _ in range(60):
        process = processes.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = latest_step(run)
        if killed < 10:
            # Wait until it makes headway (one step at least), then a random while longer.
            deadline = time.monotonic() + 60
            while latest_step(run) == before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=300)
        command = dino_command("train", "--resume", run)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, stderr
        killed += 1
    assert killed == 10
    assert_same_bits(final_state(tmp_path / "whole"), final_state(run))


def latest_step(run: Path) -> str:
    pointer = run / "checkpoints" / "latest"
    return pointer.read_text() if pointer.exists() else ""


@pytest.mark.slow
def test_three_ranks_resume_to_the_bit(photos, tmp_path):
    """With three, unlike with two, the order matters in which gradients are summed."""
    flags = ["--data", photos, *tiny_flags(epochs=4, log__knn_every=0)]
    for name, more in (("whole", []), ("part", ["--stop-after", 7])):
        done = run_dino("train", *flags, *more, "--out", tmp_path / name, ranks=3, real=name == "part")
        assert done.returncode == 0, done.stderr
        assert "reducer.cpp" not in done.stderr  # a warning of PyTorch that no user can do anything about
    done = run_dino("train", "--resume", tmp_path / "part", ranks=3)
    assert done.returncode == 0, done.stderr
    assert_same_bits(final_state(tmp_path / "whole"), final_state(tmp_path / "part"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_says_how_to_resume_and_exits_0(photos, tmp_path, number):
    run = tmp_path / "run"
    flags = tiny_flags(epochs=2000, log__every=1000)
    process = processes.start(
        dino_command("train", "--data", photos, "--out", run, *flags), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not latest_step(run) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"Next: dino train --resume {run}" in stderr
    step = int(latest_step(run).removeprefix("step-").removesuffix(".pt"))
    done = run_dino("train", "--resume", run, "--stop-after", step + 3)
    assert done.returncode == 0, done.stderr
    assert f"Resuming after step {step}" in done.stderr
    assert latest_step(run) == f"step-{step + 3:08d}.pt"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 130)])
def test_what_a_signal_tells_torchrun(photos, tmp_path, number, code):
    """SIGUSR1 ends the work of this job, which its script queues again; after SIGTERM the others may go on."""
    flags = ["--data", photos, "--out", tmp_path / "run", *tiny_flags(epochs=2000, log__every=1000)]
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "x"}
    process = processes.start(dino_command("train", *flags), stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not latest_step(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Stopped and saved after step" in stderr


@pytest.mark.parametrize("batch_size", [4, 5])
def test_two_ranks_equal_one_rank(photos, tmp_path, batch_size):
    """The same global batch on one and on two processes, in halves or not: within 1e-5 after 10 steps and more."""
    flags = tiny_flags(epochs=3, model__drop_path=0.2, batch_size=batch_size)
    for ranks in (1, 2):
        done = run_dino("train", "--data", photos, "--out", tmp_path / f"r{ranks}", *flags, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = final_state(tmp_path / "r1"), final_state(tmp_path / "r2")
    assert one["step"] == two["step"] >= 10
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5, msg=name)
    losses = [[x["loss"] for x in read_metrics(tmp_path / f"r{r}" / "metrics.jsonl") if "loss" in x] for r in (1, 2)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_one_command_starts_a_run_and_continues_it(photos, tmp_path):
    """To the bit, on fewer and on more processes within rounding; a finished run is left as it is."""
    flags = ["--data", photos, *tiny_flags(batch_size=5), "--resume", "auto", "--out", tmp_path / "run"]
    whole = run_dino("train", "--data", photos, *tiny_flags(batch_size=5), "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for stop, ranks in ((2, 3), (5, 1), (None, 2), (None, 1)):
        more = () if stop is None else ("--stop-after", stop)
        done = run_dino("train", *flags, *more, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert ("Resuming after step" in done.stderr) == ((stop, ranks) != (2, 3))
    one, other = final_state(tmp_path / "whole"), final_state(tmp_path / "run")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5, msg=name)
    done = run_dino("train", *flags, "--optim.lr", "1e-3")
    assert done.returncode == 2
    assert "optim.lr is 0.001 where it was" in done.stderr


SLOW = """
import os, sys, time
import dino
from dino.data.loader import ViewBatches
from dino.method import Network
from helpers import TINY
kind, name = {"passes": (Network, "forward"), "images": (ViewBatches, "__getitem__")}[sys.argv[3]]
work = getattr(kind, name)
if os.environ["RANK"] == "1":
    setattr(kind, name, lambda *given: (time.sleep(0.1), work(*given))[1])
dino.train(data=sys.argv[1], out=sys.argv[2], **TINY)
"""


@pytest.mark.parametrize(
    ("slow", "why"), [("passes", "its own passes take longer"), ("images", "its images come late")]
)
def test_it_is_said_which_rank_the_others_wait_for(photos, tmp_path, slow, why):
    script = tmp_path / "script.py"
    script.write_text(SLOW)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [*launch, str(script), str(photos), str(tmp_path / "run"), slow]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("The others wait for rank 1 on ") == 1
    assert why in done.stderr


THREADS = """
import os, sys
from pathlib import Path
import dino
from helpers import TINY
dino.train(data=sys.argv[1], out=sys.argv[2], stop_after=2, **TINY)
left = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
Path(f"{sys.argv[2]}-{os.environ['RANK']}").write_text(" ".join(name for name in left if "gloo" in name))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux only")
def test_ranks_leave_no_threads_of_their_group(photos, tmp_path):
    """Those that are left when Python exits make it abort now and then, and torchrun call the finished run a failure."""
    script = tmp_path / "script.py"
    script.write_text(THREADS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [*launch, str(script), str(photos), str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"run-{rank}").read_text() for rank in (0, 1)] == ["", ""]


def test_two_ranks_refuse_with_one_sentence(photos, tmp_path):
    for flags, said in (
        (["--data", tmp_path / "none"], "does not exist"),
        (["--data", photos, *tiny_flags(batch_size=1)], "leaves some of 2 processes without an image"),
    ):
        done = run_dino("train", *flags, "--out", tmp_path / "run", ranks=2, real=said == "does not exist")
        assert done.returncode != 0
        assert done.stderr.count("dino: ") == done.stderr.count(said) == 1
        assert "Connection" not in done.stderr
        assert not (tmp_path / "run").exists()


def test_bad_images_are_skipped_counted_and_named(photos, tmp_path):
    (photos / "class0" / "000.jpg").write_bytes(b"")
    (photos / "class1" / "001.jpg").write_text("not an image")
    run = dino.train(TRAIN, data=str(photos), out=str(tmp_path / "run"), **{"data.max_bad_fraction": 0.2})
    listed = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {line["image"] for line in listed} <= {"class0/000.jpg", "class1/001.jpg"}
    assert listed
    assert all(line["reason"] for line in listed)


def test_too_many_bad_images_end_the_run(photos, tmp_path):
    for path in sorted(photos.rglob("*.jpg"))[:6]:
        path.write_bytes(path.read_bytes()[:200])
    done = run_dino("train", "--data", photos, "--out", tmp_path / "run", *tiny_flags())
    assert done.returncode == 1
    assert "could not be read" in done.stderr
    assert "--data.max-bad-fraction" in done.stderr
    assert "Traceback" not in done.stderr


def test_non_finite_loss_names_the_last_good_checkpoint(photos, tmp_path):
    run = tmp_path / "run"
    explode = {"optim__clip_grad": 0.0, "optim__name": "sgd", "optim__lr": 1e30, "optim__warmup_epochs": 2}
    flags = tiny_flags(epochs=20, log__every=1, log__checkpoint_minutes=1e-6, **explode)
    done = run_dino("train", "--data", photos, "--out", run, *flags)
    assert done.returncode == 1, done.stderr
    assert "the last good checkpoint is" in done.stderr
    assert str(run / "checkpoints") in done.stderr
    assert all(torch.isfinite(v).all() for v in final_state(run).values())


def test_full_disk_during_a_run(photos, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        done = run_dino("train", "--data", photos, "--out", disk / "run", *tiny_flags(log__keep=5))
        assert done.returncode == 1, done.stderr
        assert "the last good checkpoint is" in done.stderr
        assert "Traceback" not in done.stderr
        assert final_state(disk / "run")["step"] > 0
    finally:
        subprocess.run(["umount", disk], check=True)


def test_tensorboard_events_hold_the_metrics(photos, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = dino.train(TRAIN, data=str(photos), out=str(tmp_path / "run"), epochs=1, **{"log.to": ("tensorboard",)})
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "lr", "weight_decay", "momentum", "teacher_temp", "teacher_entropy", "kl"} <= tags
    assert {"center_norm", "feature_std", "effective_rank", "grad_norm", "images_per_second"} <= tags
    assert {"data_wait_share", "peak_memory_gb"} <= tags


def collapse_run(tmp_path, **changes):
    """Train on drawn scenes; the step of the first collapse warning, what was said, and the last metrics."""
    chosen = {"epochs": 12, "batch_size": 16, "log__every": 10, "model__width": 64, "model__patch_size": 8}
    chosen |= {"head__out_dim": 256, "head__hidden_dim": 256, "head__bottleneck_dim": 64, "log__knn_every": 0}
    chosen |= {"optim__lr": 8e-3, "method__momentum": 0.98} | changes
    done = run_dino("train", "--data", "scenes:320", "--out", tmp_path / "run", *tiny_flags(**chosen))
    assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first = next((line["step"] for line in lines if "collapse" in line), None)
    return first, done.stderr, [line for line in lines if "loss" in line]


def test_without_centering_one_prototype_dominates_and_is_named(tmp_path):
    first, said, _ = collapse_run(tmp_path, method__targets="none", stop_after=120)
    assert first is not None
    assert first <= 100
    assert "collapse to one prototype" in said


def test_without_sharpening_it_is_uniform_and_named(tmp_path):
    first, said, _ = collapse_run(tmp_path, method__teacher_temp=1.0, method__teacher_temp_start=1.0, stop_after=120)
    assert first is not None
    assert first <= 100
    assert "uniform collapse" in said


def test_a_healthy_run_raises_no_alarm(tmp_path):
    first, said, lines = collapse_run(tmp_path)
    assert first is None
    assert "collapse" not in said
    # And it is healthy: the targets tell images apart (their mean is more spread than each one is).
    assert lines[-1]["prototype_usage"] - lines[-1]["teacher_entropy"] > 0.3


def test_sixteen_bit_and_palette_and_gray_train_too(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "odd"
    folder.mkdir()
    for i in range(12):
        gray = Image.fromarray(rng.integers(0, 255, (50, 40)).astype(np.uint8))
        form = [gray, gray.convert("P"), gray.convert("LA"), gray.convert("CMYK")][i % 4]
        form.save(folder / f"{i}.{['png', 'png', 'png', 'tiff'][i % 4]}")
    run = dino.train(TRAIN, data=str(folder), out=str(tmp_path / "run"), epochs=1)
    assert not (run / "quarantine.jsonl").exists()
