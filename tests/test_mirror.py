"""Run directories in an object store: a real server, machines that lose their disk, and copies that were cut off."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

import dino
import processes
from dino import cli
from dino.data.storage import upload
from dino.engine.folder import name_folder
from dino.engine.mirror import Mirror
from dino.options import replace
from dino.options.train import TrainOptions
from helpers import assert_same_bits, dino_command, draw_images, final_state, run_dino, tiny_flags
from object_store import ObjectStore


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        yield store


@pytest.fixture
def bucket(store, tmp_path, monkeypatch) -> str:
    """An empty bucket, of which this machine knows nothing yet."""
    store.use_here(monkeypatch, tmp_path / "home")
    (tmp_path / "empty").mkdir()
    return store.upload(tmp_path / "empty", tmp_path.name.replace("_", "-").lower())


def train(*arguments: object, ranks: int = 1, **options: Any) -> Any:
    return processes.run(dino_command("train", *arguments), ranks=ranks, env=dict(os.environ), **options)


def lose_the_disk() -> None:
    shutil.rmtree(os.environ["DINO_CACHE"])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "more"), [(1, []), (2, ["--shard", "all"])])
def test_another_machine_goes_on_to_the_bit(bucket, tmp_path, ranks, more):
    photos = draw_images(tmp_path / "photos")
    flags = ["--data", photos, *tiny_flags(epochs=2), *more]
    assert run_dino("train", *flags, "--out", tmp_path / "whole", ranks=ranks).returncode == 0
    there = ["--out", f"{bucket}/runs/a", "--resume", "auto"]
    first = train(*flags, *there, "--stop-after", 6, ranks=ranks)
    assert first.returncode == 0, first.stderr
    assert f"copied to {bucket}/runs/a." in first.stderr
    lose_the_disk()
    second = train(*flags, *there, ranks=ranks)
    assert second.returncode == 0, second.stderr
    assert "Resuming after step 6" in second.stderr
    mirror = Mirror(f"{bucket}/runs/a")
    assert (mirror.folder / "teacher.safetensors").read_bytes() == (tmp_path / "whole/teacher.safetensors").read_bytes()
    if ranks == 1:
        assert_same_bits(final_state(tmp_path / "whole"), final_state(mirror.folder))
    names = mirror.list_copied()
    assert {"config.toml", "teacher.safetensors", "checkpoints/latest", "metrics.jsonl"} <= {*names}
    assert (
        len({name.split("/")[1] for name in names if name.startswith("checkpoints/step-")}) == 2
    )  # old ones are deleted
    assert not [name for name in names if ".lock" in name or ".tmp" in name]
    if ranks == 1:  # a report on a third machine, of what is in the store
        lose_the_disk()
        made = processes.run(dino_command("report", there[1]), env=dict(os.environ))
        assert made.returncode == 0, made.stderr
        assert made.stdout.strip() == str(mirror.folder / "report.html")
        assert (mirror.folder / "report.html").is_file()
    again = train(*flags, *there[:2])
    assert again.returncode == 2
    assert "holds a run; continue it with --resume auto" in again.stderr


@pytest.mark.slow
def test_a_copy_that_was_cut_off_counts_for_nothing(bucket, tmp_path):
    """Of the newest sharded checkpoint only some files arrived: the one before it is taken."""
    photos = draw_images(tmp_path / "photos")
    flags = ["--data", photos, *tiny_flags(epochs=3), "--shard", "all", "--no-report", "--out", f"{bucket}/runs/a"]
    assert train(*flags, "--stop-after", 6).returncode == 0
    mirror = Mirror(f"{bucket}/runs/a")
    newest = max(mirror.folder.glob("checkpoints/step-*.shards"))
    half = mirror.folder / "checkpoints/step-00000008.shards"
    shutil.copytree(newest, half)
    (half / ".metadata").unlink()
    for path in half.iterdir():
        upload(path, f"{mirror.address}/checkpoints/{half.name}/{path.name}")
    lose_the_disk()
    done = train(*flags, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "Resuming after step 6" in done.stderr


def test_mistakes_take_a_sentence(bucket, tmp_path):
    photos = draw_images(tmp_path / "photos")
    flags = ["--data", photos, *tiny_flags(epochs=1)]
    for more, said in (
        (["--out", f"{bucket}/a", "--overwrite"], "--overwrite deletes nothing at an address"),
        (["--resume", f"{bucket}/a"], f"write --out {bucket}/a --resume auto"),
        (["--out", "s3://there-is-no-such-bucket/a"], "there-is-no-such-bucket/a"),
    ):
        done = train(*flags, *more)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr
    done = processes.run(dino_command("report", f"{bucket}/none"), env=dict(os.environ))
    assert done.returncode == 2
    assert f"dino: {bucket}/none holds no run (no config.toml); give the --out address of a run." in done.stderr


def test_only_a_training_itself_takes_an_address():
    """`dino submit` and all else that chooses a run directory would make a folder called s3:."""
    with pytest.raises(ValueError, match="is an address, which only `dino train` itself takes; give a folder"):
        name_folder(replace(TrainOptions(), {"out": "s3://bucket/a"}))


def test_weights_at_an_address(store, bucket, saved_model, tmp_path, capsys):
    address = store.upload(saved_model, f"{bucket.removeprefix('s3://')}/runs/a")
    expected = dino.load(saved_model).state_dict()
    for name in (address, f"{address}/", f"{address}:last", f"{address}/teacher.safetensors"):
        if name.endswith(".safetensors"):
            dino.export(saved_model, "safetensors", tmp_path / "one.safetensors")
            upload(tmp_path / "one.safetensors", name := f"{bucket}/one.safetensors")
        assert_same_bits(dino.load(name).state_dict(), expected)
    asked = len(store.asked)
    dino.load(address)
    assert len(store.asked) == asked, "it is here already"
    assert cli.main(["embed", address, str(draw_images(tmp_path / "photos")), "--out", str(tmp_path / "e")]) == 0
    assert cli.main(["embed", f"{bucket}/nothing", str(tmp_path / "photos"), "--out", str(tmp_path / "f")]) == 2
    said = capsys.readouterr().err
    assert f"there is no teacher.safetensors at {bucket}/nothing" in said
    assert "Traceback" not in said
