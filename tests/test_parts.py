"""`dino embed` as independent jobs: in any parts, killed, at once, on a disk and in an object store."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dino
import processes
from dino.cli import main, parse
from dino.data import storage
from dino.features.embed import choose_share
from dino.features.embedding import Folder
from dino.features.shards import list_shards
from helpers import dino_command, draw_images, draw_images_and_a_broken_one, run_dino
from object_store import ObjectStore

pq = pytest.importorskip("pyarrow.parquet")

COUNT, SHARD = 44, 2  # images, of which one is none; images of a shard


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    return draw_images_and_a_broken_one(tmp_path_factory.mktemp("many"), COUNT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, many, saved_model) -> Folder:
    """An embedding that nothing interrupted."""
    return dino.embed(saved_model, many, tmp_path_factory.mktemp("whole") / "x.parquet", shard=SHARD, device="cpu")


@pytest.fixture
def store():
    with ObjectStore() as store:
        yield store


@pytest.fixture
def bucket(store, monkeypatch, tmp_path):
    store.use_here(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.01)
    (tmp_path / "empty").mkdir()
    return store.upload(tmp_path / "empty", "bucket/features")


def assert_same_rows(out: Path, other: Path) -> None:
    a, b = (pq.read_table(folder).replace_schema_metadata(None) for folder in (out, other))
    assert a.drop_columns(["feature"]).equals(b.drop_columns(["feature"]))
    found, expected = (np.stack(table["feature"].to_pylist()) for table in (a, b))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def download(address: str, folder: Path) -> Path:
    system, inside = storage.open_filesystem(address)
    system.get(inside, str(folder), recursive=True)
    return folder


@given(st.integers(0, 300), st.integers(1, 400))
def test_parts_are_all_shards_once(shards, parts):
    shares = [choose_share(shards, f"{i}/{parts}") for i in range(1, parts + 1)]
    assert [number for share in shares for number in share] == [*range(shards)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.slow
def test_parts_of_one_try_and_of_another(tmp_path, whole, many, saved_model, capsys):
    """Two jobs of three; then the same data in two parts. Each says what is missing, and so does a search."""
    out = tmp_path / "x.parquet"
    command = ["embed", str(saved_model), str(many), "--out", str(out), "--shard", str(SHARD), "--device", "cpu"]
    assert main([*command, "--part", "1/3"]) == 0
    assert main([*command, "--part", "3/3"]) == 0
    said = capsys.readouterr().out
    assert "part 3/3 is done; of 22 files these of other parts are missing: 7-13" in said
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(written) == 15
    assert main(["search", str(out), str(many / "class0" / "000.jpg")]) == 2
    complaint = capsys.readouterr().err
    assert "is incomplete, 15 of 22 shards (missing: 7-13); complete it with: dino embed " in complaint
    words = shlex.split(complaint.strip().partition("complete it with: dino ")[2])
    parse(words)
    assert main([*command, "--part", "1/2"]) == 0
    assert "these of other parts are missing: 11-13" in capsys.readouterr().out
    assert main([*words, "--device", "cpu"]) == 0  # what the search said
    assert f"{COUNT - 1} features of 96 numbers, 22 files" in (said := capsys.readouterr()).out
    assert "missing" not in said.out
    assert "class1/broken.jpg: not an image" in said.err
    assert written.items() <= {path: path.stat().st_mtime_ns for path in out.iterdir()}.items(), "nothing is done twice"
    assert_same_rows(out, whole.path)


@pytest.mark.slow
def test_jobs_at_once_harm_nobody(tmp_path, whole, many, saved_model):
    """Two parts, each twice, and one more that is killed."""
    out = tmp_path / "x.parquet"
    command = dino_command("embed", saved_model, many, "--out", out, "--shard", SHARD, "--device", "cpu", "--part")
    jobs = [
        processes.start([*command, part], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for part in ("1/2", "2/2", "2/2", "1/2", "1/1")
    ]
    while not list(out.glob("*.parquet")):
        time.sleep(0.001)
    jobs[-1].send_signal(signal.SIGKILL)
    for job in jobs:
        _, said = job.communicate()
        assert job.returncode == (0 if job is not jobs[-1] else -signal.SIGKILL), said
    assert Folder.open(out).rows == COUNT - 1
    assert_same_rows(out, whole.path)


def test_what_another_job_is_writing_stays(tmp_path, many, saved_model):
    out = tmp_path / "x.parquet"
    out.mkdir()
    (young := out / ".part-000003.parquet.77.tmp").write_bytes(b"half")
    (old := out / ".part-000004.parquet.78.tmp").write_bytes(b"half")
    os.utime(old, (1e9, 1e9))
    dino.embed(saved_model, many, out, shard=SHARD, part="1/4", device="cpu")
    assert young.exists()
    assert not old.exists()
    assert dino.embed(saved_model, many, out, shard=SHARD, device="cpu").rows == COUNT - 1


def test_parts_of_something_else_are_refused(tmp_path, many, whole, saved_model, capsys):
    out, other = tmp_path / "x.parquet", draw_images(tmp_path / "other", COUNT)
    command = ["embed", str(saved_model), "--out", str(out), "--shard", str(SHARD), "--device", "cpu", "--part", "2/4"]
    dino.embed(saved_model, many, out, shard=SHARD, part="1/4", device="cpu")
    for more, text in (
        ([other], "whose data_sha256 is"),
        ([many, "--pooling", "gem"], "whose pooling is cls and not gem"),
    ):
        assert main([*command, *map(str, more)]) == 2
        assert text in capsys.readouterr().err
    dino.embed(saved_model, other, late := tmp_path / "late.parquet", shard=SHARD, part="4/4", device="cpu")
    shutil.copy(next(late.iterdir()), out)  # of a job that began before there was anything
    with pytest.raises(ValueError, match=r"part-00.* is of another embedding than part-000000\.parquet"):
        Folder.open(out, whole=False)


@pytest.mark.parametrize("part", ["0/0", "5/4", "a/b", "0/3", "1", "1/0", "-1/2", "1/2/3", ""])
def test_a_part_that_there_is_not(part, many, saved_model, tmp_path, capsys):
    out = tmp_path / "x.parquet"
    assert main(["embed", str(saved_model), str(many), "--out", str(out), f"--part={part}"]) == 2
    assert f"part is {part}; write i/n, the i-th of n parts" in capsys.readouterr().err
    assert not out.exists()


def test_more_parts_than_shards(many, saved_model, tmp_path, capsys):
    for i in (1, 2, 3):
        options = ["--shard", "30", "--part", f"{i}/3", "--device", "cpu"]
        assert main(["embed", str(saved_model), str(many), "--out", str(tmp_path / "x.parquet"), *options]) == 0
    assert Folder.open(tmp_path / "x.parquet").rows == COUNT - 1


@pytest.mark.slow
def test_two_ranks_share_a_part(tmp_path, whole, many, saved_model):
    out = tmp_path / "x.parquet"
    for part in ("2/2", "1/2"):
        done = run_dino(
            "embed", saved_model, many, "--out", out, "--shard", SHARD, "--device", "cpu", "--part", part, ranks=2
        )
        assert done.returncode == 0, done.stderr
    assert_same_rows(out, whole.path)


# --- an object store -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_in_a_bucket(tmp_path, whole, many, saved_model, store, bucket, capsys):
    """A job that is killed, the same again and another one; then a copy is searched."""
    command = ["embed", str(saved_model), str(many), "--out", bucket, "--shard", str(SHARD), "--device", "cpu"]
    job = processes.start(
        dino_command(*command, "--part", "2/2"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while len(list_shards(bucket)[0]) < 3:
        assert job.poll() is None, job.communicate()
        store.delay = 0.1  # of every answer from now on, so that the job is not done before it is killed
    job.send_signal(signal.SIGKILL)
    job.communicate()
    store.delay = 0.0
    before = storage.list_files(bucket)
    assert 3 <= len(before) < 11
    assert main([*command, "--part", "1/2"]) == 0
    assert re.search(r"part 1/2 is done; of 22 files these of other parts are missing: \d\d", capsys.readouterr().out)
    assert main([*command, "--part", "2/2"]) == 0
    assert f"{COUNT - 1} features of 96 numbers, 22 files" in capsys.readouterr().out
    after = storage.list_files(bucket)
    assert [*after] == [path.name for path in sorted(whole.path.iterdir())], "and nothing else"
    assert before.items() <= after.items(), "nothing is done twice"
    assert main(["search", bucket, str(many / "class0" / "000.jpg")]) == 2
    assert f"{bucket} lies elsewhere, and features are read from a disk; copy" in capsys.readouterr().err
    assert_same_rows(download(bucket, tmp_path / "copy.parquet"), whole.path)
    assert Folder.open(tmp_path / "copy.parquet").rows == COUNT - 1
    assert main([*command, "--pooling", "gem"]) == 2
    assert "holds another embedding, whose pooling is cls and not gem" in capsys.readouterr().err


def test_a_folder_is_listed_while_another_job_tries_whether_it_may_write(bucket):
    """It tries with a file that it writes and deletes, alone in a new folder."""
    folder, done = f"{bucket}/new", threading.Event()

    def write_and_delete() -> None:
        while not done.is_set():
            storage.require_writable(folder)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(write_and_delete)
        try:
            assert all(list_shards(folder)[0] == {} for _ in range(50))
        finally:
            done.set()
        other.result()


def test_a_damaged_shard_in_a_bucket_is_written_again(tmp_path, whole, many, saved_model, bucket):
    dino.embed(saved_model, many, bucket, shard=SHARD, device="cpu")
    storage.write_file(f"{bucket}/part-000003.parquet", b"PAR1 cut short")
    with pytest.raises(ValueError, match=r"part-000003.parquet is damaged or cut short"):
        Folder.open(bucket, whole=False)
    dino.embed(saved_model, many, f"{bucket}/", shard=SHARD, device="cpu")
    assert [*storage.list_files(bucket)] == [path.name for path in sorted(whole.path.iterdir())]
    assert_same_rows(download(bucket, tmp_path / "copy.parquet"), whole.path)


def test_a_bucket_that_takes_nothing_is_said_before_any_work(many, saved_model, bucket, monkeypatch, capsys):
    monkeypatch.setattr(storage, "TRIES", 2)
    monkeypatch.setattr("dino.features.embed.extract_batches", lambda *_, **__: pytest.fail("work was done"))
    assert main(["embed", str(saved_model), str(many), "--out", "s3://nowhere/x", "--device", "cpu"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dino: ")]
    assert "s3://nowhere/x" in said
    assert "cannot be written" in said
