"""`dino submit` and `dino ablate --slurm` on a real Slurm: two nodes on this machine, started by tests/slurm/cluster.sh."""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w

from dino import cli
from dino.engine.log import read_metrics
from dino.options import replace
from dino.options.toml import to_dict
from dino.options.train import TrainOptions
from helpers import TINY, assert_same_bits, dino_command, final_state, read_example, run_dino, tiny_flags

SCRIPT = Path(__file__).with_name("slurm") / "cluster.sh"
PATH = f"{os.environ['PATH']}:/usr/sbin"
MISSING = [
    name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun") if shutil.which(name, path=PATH) is None
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which commands reach the cluster."""
    pytest.importorskip("submitit")
    if MISSING:
        pytest.skip(f"there is no {', '.join(MISSING)} here; as root, {SCRIPT} install")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # paths of sockets are short
        try:
            subprocess.run([SCRIPT, "start", folder], check=True, timeout=60)
            yield os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
        finally:
            subprocess.run([SCRIPT, "stop", folder], check=True, timeout=60)


def call(cluster: dict[str, str], *command: object) -> str:
    return subprocess.run([*map(str, command)], env=cluster, check=True, capture_output=True, text=True).stdout


def submit(cluster: dict[str, str], folder: Path, *words: object) -> str:
    """The id of a job that `dino submit`, or another command, sends from `folder`."""
    done = subprocess.run(
        dino_command(*words), cwd=folder, env=cluster, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"Job (\d+):", done.stdout + done.stderr)
    assert found, done.stdout + done.stderr
    return found[1]


def look(cluster: dict[str, str], job: str) -> dict[str, str]:
    return dict(re.findall(r"(\S+?)=(\S*)", call(cluster, "scontrol", "show", "job", job)))


def wait(what: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_to_end(cluster: dict[str, str], job: str) -> dict[str, str]:
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait(lambda: look(cluster, job)["JobState"] in ends)
    return look(cluster, job)


def read_log(run: Path, job: str) -> str:
    return (run / "slurm" / f"{job}_0_log.out").read_text()


def count_steps(run: Path) -> int:
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=0)


@pytest.mark.machines
@pytest.mark.slow
def test_a_run_on_two_nodes_is_preempted_twice_and_ends_with_the_same_bits(cluster, photos, tmp_path):
    """First by SIGUSR1, after which it queues itself again; then by another job, for which Slurm ends and requeues it."""
    flags = tiny_flags(epochs=60, data__num_workers=1, log__knn_every=0)
    run, whole = tmp_path / "run", tmp_path / "whole"
    job = submit(
        cluster, tmp_path, "submit", "--nodes", 2, "--cpus", 1, "train", "--data", photos.name, "--out", "run", *flags
    )
    wait(lambda: count_steps(run) > 5)
    call(cluster, "scancel", "--signal=USR1", job)
    wait(lambda: "Resuming after step" in read_log(run, job))
    first = count_steps(run)
    wait(lambda: count_steps(run) > first + 5)
    call(cluster, "srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    done = run_dino("train", "--data", photos, "--out", whole, *flags, ranks=2)
    assert done.returncode == 0, done.stderr
    state = wait_to_end(cluster, job)
    log = read_log(run, job)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), log
    assert log.count("Finishing this step and saving") == 2, log
    assert log.count("Resuming after step") == 2, log
    assert log.count("on 2 CPU process(es)") == 3, log
    assert_same_bits(final_state(whole), final_state(run))


@pytest.mark.machines
@pytest.mark.slow
def test_a_run_goes_on_after_its_time_limit(cluster, photos, tmp_path):
    """Slurm's shortest limit is a minute: the process is stopped, until Slurm wakes it to warn of the end."""
    flags = ["--data", photos, *tiny_flags(epochs=60, log__knn_every=0)]
    run, whole = tmp_path / "run", tmp_path / "whole"
    given = ["--gpus", 0, "--cpus", 1, "--hours", 0.01, "--slurm", "signal=USR1@10", "comment=tests"]
    job = submit(cluster, tmp_path, "submit", *given, "train", *flags, "--out", run)
    wait(lambda: count_steps(run) > 5)
    call(cluster, "scancel", "--signal=STOP", job)
    assert run_dino("train", *flags, "--out", whole).returncode == 0
    state, log = wait_to_end(cluster, job), read_log(run, job)
    assert state["JobState"] == "COMPLETED", log
    assert (state["TimeLimit"], state["Comment"]) == ("00:01:00", "tests")
    assert int(state["Restarts"]) == log.count("Resuming after step") == log.count("Job has timed out") > 0, log
    assert_same_bits(final_state(whole), final_state(run))
    assert_not_new(cluster, run, flags)


def assert_not_new(cluster: dict[str, str], run: Path, flags: list[object]) -> None:
    done = run_dino("submit", "train", *flags, "--out", run, env=cluster)
    assert done.returncode == 2
    assert f"already holds a run; continue it with --resume {run}" in done.stderr
    done = run_dino("train", *flags, "--out", run, "--overwrite", "--stop-after", 1)
    assert done.returncode == 0, done.stderr
    assert not (run / "slurm").exists()


@pytest.mark.machines
@pytest.mark.slow
def test_a_script_with_torchrun_queues_itself_again(cluster, photos, tmp_path):
    """That of docs/clusters.md, with fewer GPUs and a smaller model; Slurm sends its signal to the script."""
    flags = ["--data", photos, *tiny_flags(epochs=60, log__knn_every=0)]
    text = read_example("train.sbatch").replace("per-node=8", "per-node=1").replace("per-node 8", "per-node 1")
    text = text.replace("cpus-per-task=64", "cpus-per-task=1")
    text, found = re.subn("train vit_small_100ep --data train/", shlex.join(map(str, ["train", *flags])), text)
    assert found == 1
    (tmp_path / "train.sbatch").write_text(text)
    environment = cluster | {"PATH": f"{Path(sys.executable).parent}:{cluster['PATH']}"}
    sent = subprocess.run(["sbatch", "train.sbatch"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    job, run, whole = sent.stdout.split()[-1], tmp_path / "runs" / "a", tmp_path / "whole"
    wait(lambda: count_steps(run) > 5)
    call(cluster, "scancel", "--batch", "--signal=USR1", job)
    done = run_dino("train", *flags, "--out", whole, ranks=2)
    assert done.returncode == 0, done.stderr
    state, log = wait_to_end(cluster, job), (tmp_path / f"dino-{job}.log").read_text()
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log
    assert log.count("Resuming after step") == 1, log
    assert_same_bits(final_state(whole), final_state(run))


@pytest.mark.machines
@pytest.mark.slow
def test_a_run_that_fails_is_not_queued_again(cluster, photos, tmp_path):
    """Neither does the other process wait for the one that ended."""
    given = ["--gpus", 2, "--cpus", 1, "train", "--data", photos, "--out", tmp_path / "run"]
    job = submit(cluster, tmp_path, "submit", *given, *tiny_flags(optim__lr=1e9, epochs=600, log__knn_every=0))
    state, log = wait_to_end(cluster, job), read_log(tmp_path / "run", job)
    assert (state["JobState"], state["Restarts"]) == ("FAILED", "0"), log
    assert "dino: the " in log, log
    assert "Traceback" not in log, log


@pytest.mark.machines
@pytest.mark.slow
def test_rows_of_a_table_are_an_array(cluster, photos, tmp_path):
    (tmp_path / "tiny.toml").write_text(tomli_w.dumps(to_dict(replace(TrainOptions(), TINY))))
    command = ["ablate", "activation", "--data", photos, "--recipe", "tiny.toml", "--out", "out", "--epochs", 40]
    command += ["--device", "cpu", "--no-report", "--slurm", "cpus-per-task=1"]
    job = submit(cluster, tmp_path, *command)
    row = tmp_path / "out" / "no-bn-gelu"
    wait(lambda: count_steps(row) > 3)
    call(cluster, "scancel", "--signal=USR1", f"{job}_0")
    again = subprocess.run(
        dino_command(*command), cwd=tmp_path, env=cluster, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert re.search(f"Job {job} still has [123] of them", again.stderr), again.stderr
    for number in range(3):
        state = wait_to_end(cluster, f"{job}_{number}")
        assert (state["JobState"], state["Restarts"]) == ("COMPLETED", str(int(number == 0)))
    done = subprocess.run(
        dino_command(*command), cwd=tmp_path, env=cluster, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "table.csv", newline="") as file:
        assert [bool(row[1]) for row in csv.reader(file)] == [True] * 4


@pytest.mark.machines
@pytest.mark.slow
def test_slurm_says_why_it_refuses(cluster, photos, tmp_path):
    for words, said in (
        (["--partition", "train", "train"], "invalid partition specified: train"),
        (["--slurm", "time=soon", "train"], "Invalid --time specification"),
        (["--slurm", "qso=high", "train"], "unrecognized option '--qso=high'"),
    ):
        done = run_dino("submit", *words, "--data", photos, "--out", tmp_path / "run", env=cluster)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert said in done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "dino submit sends a training; write it behind the options"),
        (["--partition", "train", "--data", "photos"], "there is no option '--data'"),
        (["--gpus", "-1", "train"], "gpus is -1; it cannot be negative"),
        (["--slurm", "QOS", "train"], "QOS; write an option of sbatch as KEY=VALUE"),
        (["train", "--epochs", "0"], "epochs is 0.0; it must"),
        (["train", "photos"], "photos"),
        (["train", "--overwrite"], "--overwrite does not go with dino submit"),
        (["train", "--resume", "nowhere"], "nowhere holds no run"),
        (["train"], "there is no Slurm here"),
    ],
)
def test_kind_to_mistakes(words, said, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert cli.main(["submit", *words]) == 2
    assert said in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys, monkeypatch):
    pytest.importorskip("submitit")
    for name in ("sbatch", "srun"):  # also where there is no Slurm; neither is reached
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "file").touch()
    assert cli.main(["submit", "train", "--out", str(tmp_path / "file" / "run")]) == 2
    assert f"--out {tmp_path / 'file' / 'run'}" in capsys.readouterr().err


def test_help_is_that_of_the_job_or_that_of_the_training(capsys):
    for words, said in ((["--help"], "--partition"), (["train", "--help"], "--batch-size")):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["submit", *words])
        assert said in capsys.readouterr().out
