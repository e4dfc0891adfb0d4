"""Images in an object store and on a web server: the same run as from the disk, whatever the answers are like."""

from __future__ import annotations

import functools
import http.server
import shutil
import threading

import numpy as np
import pytest

import dino
from dino import cli
from dino.data import ranges, storage
from dino.data.decode import BadImage
from dino.data.open import open_images
from dino.data.ranges import Unreachable
from dino.data.reader import Reader
from dino.data.specs import get_name, make_absolute
from dino.data.storage import Place
from helpers import TINY, assert_same_bits, draw_images, final_state, pack_images, run_dino, tiny_flags
from object_store import ObjectStore


@pytest.fixture
def store(monkeypatch, tmp_path):
    with ObjectStore() as store:
        store.use_here(monkeypatch, tmp_path / "home")
        monkeypatch.setattr(storage, "_FIRST_WAIT", 0.01)
        yield store


@pytest.fixture
def folder(tmp_path):
    return draw_images(tmp_path / "images")


def test_a_folder_in_a_bucket_is_the_folder(store, folder):
    (folder / "notes.md").write_text("no image")
    files, remote = open_images(folder), open_images(store.upload(folder, "bucket/photos"))
    assert [remote.name(i) for i in range(24)] == [files.name(i) for i in range(24)]
    assert remote.classes == files.classes
    assert remote.fingerprint == files.fingerprint
    np.testing.assert_array_equal(remote.read(23), files.read(23))


@pytest.mark.parametrize("spec", ["", "/*.tar", "/{0000..0002}.tar"])
def test_shards_in_a_bucket(store, folder, tmp_path, spec):
    local = open_images(pack_images(folder, tmp_path / "shards"))
    remote = open_images(store.upload(tmp_path / "shards", "bucket/some/shards") + spec)
    assert remote.fingerprint == local.fingerprint
    assert [remote.name(i) for i in range(24)] == [local.name(i) for i in range(24)]
    np.testing.assert_array_equal(remote.read(9), local.read(9))
    shutil.rmtree(tmp_path / "shards/.dino-index")
    asked = len(store.asked)
    assert len(open_images("s3://bucket/some/shards" + spec)) == 24
    assert len(store.asked) == asked, "the index is known"


@pytest.mark.parametrize("kind", ["files", "tars"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_the_one_from_the_disk_whatever_the_answers(store, folder, tmp_path, kind, workers, capfd):
    data = folder if kind == "files" else pack_images(folder, tmp_path / "shards")
    address = store.upload(data, "bucket/data")
    changes = TINY | {"epochs": 1, "data.num_workers": workers}
    dino.train(data=data, out=tmp_path / "local", **changes)
    store.delay, store.fails, store.cuts = 0.02, 3, 5
    dino.train(data=address, out=tmp_path / "remote", **changes)
    assert_same_bits(final_state(tmp_path / "local"), final_state(tmp_path / "remote"))
    assert not (tmp_path / "remote/quarantine.jsonl").exists()
    assert "Traceback" not in capfd.readouterr().err, "of a worker that closes what it has inherited"


def test_a_run_goes_on_after_the_store_was_gone(store, folder, tmp_path, monkeypatch, capsys):
    address = store.upload(folder, "bucket/data")
    monkeypatch.setattr(ranges, "TRIES", 2)
    flags = [*tiny_flags(epochs=1, data__num_workers=1), "--out", str(tmp_path / "run")]
    dino.train(data=folder, out=tmp_path / "local", **TINY | {"epochs": 1})
    monkeypatch.setattr(
        ObjectStore, "fails", property(lambda self: len(self.asked) > 40, lambda *_: None), raising=False
    )
    assert cli.main(["train", "--data", address, *flags]) == 1
    said = capsys.readouterr().err
    assert "s3://bucket/data/" in said.splitlines()[-1]
    assert "--resume" in said.splitlines()[-1]
    monkeypatch.setattr(ObjectStore, "fails", property(lambda self: 0, lambda *_: None), raising=False)
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert_same_bits(final_state(tmp_path / "local"), final_state(tmp_path / "run"))


def test_a_batch_is_asked_for_at_once_and_the_next_one_before_it_is_needed(store, folder):
    source = open_images(store.upload(folder, "bucket/data"))
    source.read_ahead([3, 4, 5])
    source.read_ahead([3, 4, 5])
    source.read_ahead([6])
    for i in (3, 4, 5, 6):
        source.read(i)
    assert len(store.asked) == 4, "each once"


def test_ranges_are_read_at_signed_addresses_where_the_store_answers_there(store, folder, tmp_path):
    local, source = open_images(folder), open_images(store.upload(folder, "bucket/data"))
    store.asked.clear()
    assert [source.read(i).tobytes() for i in range(4)] == [local.read(i).tobytes() for i in range(4)]
    assert store.signed == len(store.asked) == 4
    store.refuses_signed = True
    assert [source.read(i).tobytes() for i in range(8)] == [local.read(i).tobytes() for i in range(8)]
    assert store.signed == 4 + ranges._MOST_REFUSED, "then S3's library reads all"


def test_an_image_that_has_gone_is_a_bad_image(store, folder):
    source = open_images(store.upload(folder, "bucket/data"))
    storage.open_filesystem("s3://bucket")[0].rm(f"bucket/data/{source.name(3)}")
    with pytest.raises(BadImage):
        source.read(3)
    source.read_ahead([2, 3, 4])
    with pytest.raises(BadImage):
        source.read(3)
    assert source.read(2).size


# --- the cache -----------------------------------------------------------------------------------------------------


def test_what_is_kept_is_not_asked_for_again(store, folder, tmp_path):
    address = store.upload(pack_images(folder, tmp_path / "shards"), "bucket/shards")
    changes = TINY | {"data.cache": "1GB", "data.val_fraction": 0.0}
    dino.train(data=address, out=tmp_path / "a", **changes)
    asked = len(store.asked)
    dino.train(data=address, out=tmp_path / "b", **changes)
    assert len(store.asked) == asked
    assert_same_bits(final_state(tmp_path / "a"), final_state(tmp_path / "b"))


def test_a_cache_stays_small_and_forgets_what_was_used_longest_ago(store, folder, tmp_path, monkeypatch):
    source = open_images(store.upload(folder, "bucket/data"))
    monkeypatch.setattr("dino.data.reader._SWEEP", 1)
    places = [source.find_place(i) for i in range(24)]
    size = sum(len(content) for content in ranges.fetch(places))
    reader = Reader(size // 2)
    for place in places:
        reader.read(places[0])
        reader.read(place)
    kept = [*(tmp_path / "home/cache/images").glob("*/*")]
    assert 0.3 * size < sum(path.stat().st_size for path in kept) <= size / 2
    asked = len(store.asked)
    reader.read(places[0])
    reader.read(places[23])
    assert len(store.asked) == asked
    reader.read(places[1])
    assert len(store.asked) == asked + 1


def test_a_disk_that_is_full_ends_the_cache_and_not_the_run(store, folder, tmp_path, capsys):
    source = open_images(store.upload(folder, "bucket/data"))
    (tmp_path / "home/cache").mkdir(parents=True, exist_ok=True)
    (tmp_path / "home/cache/images").write_text("in the way")
    reader = Reader(10**9)
    assert reader.read(source.find_place(0)) == (folder / source.name(0)).read_bytes()
    assert reader.read(source.find_place(1)) == (folder / source.name(1)).read_bytes()
    assert capsys.readouterr().err.count("Warning: images are no longer kept") == 1


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("s3://nosuch/data", "there is no s3://nosuch/data; check the address"),
        ("s3://bucket/nosuch", "there is no s3://bucket/nosuch; check the address"),
        ("s3://bucket/data/{0..2}.tar", "of the 3 shards of 's3://bucket/data/{0..2}.tar', 3 are missing"),
        ("nosuch://bucket/data", "nosuch://bucket/data cannot be opened: Protocol not known"),
        ("http://127.0.0.1:1/x/", "check the address, the network and your credentials"),
    ],
)
def test_what_is_not_there(store, folder, tmp_path, spec, said, capsys):
    store.upload(folder, "bucket/data")
    assert cli.main(["train", "--data", spec, "--out", str(tmp_path / "run")]) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


def test_without_credentials(store, folder, tmp_path, monkeypatch, capsys):
    address = store.upload(folder, "bucket/data")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    storage.open_filesystem("s3://bucket")[0].clear_instance_cache()
    assert cli.main(["train", "--data", address, "--out", str(tmp_path / "run")]) == 2
    assert "credentials" in capsys.readouterr().err


def test_unreachable_says_which_and_why(store, folder, monkeypatch):
    source = open_images(store.upload(folder, "bucket/data"))
    monkeypatch.setattr(ranges, "TRIES", 2)
    store.fails = 1
    with pytest.raises(Unreachable, match=r"s3://bucket/data/class0/000\.jpg cannot be read"):
        source.read(0)


# --- web servers ---------------------------------------------------------------------------------------------------


class Plain(http.server.SimpleHTTPRequestHandler):
    """Python's own server, which knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass


def test_a_web_server_with_an_index_page(folder, tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Plain, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/images"
    source = open_images(address)
    assert len(source) == 24
    np.testing.assert_array_equal(source.read(5), open_images(folder).read(5))
    server.shutdown()
    server.server_close()


# --- commands ------------------------------------------------------------------------------------------------------


def test_names_of_addresses():
    assert get_name("s3://bucket/some/shards/{0000..0127}.tar") == "shards"
    assert get_name("s3://bucket/photos/") == "photos"
    assert get_name("https://host/a.tar") == "a"
    assert make_absolute("s3://bucket/{0..3}.tar") == "s3://bucket/{0..3}.tar"


def test_commands_on_their_own(store, folder, saved_model, tmp_path):
    address = store.upload(folder, "bucket/data")
    local = run_dino("eval", "knn", saved_model, "--data", folder, "--k", 3)
    remote = run_dino("eval", "knn", saved_model, "--data", address, "--k", 3)
    assert remote.returncode == 0, remote.stderr
    assert remote.stdout.replace(address, str(folder)) == local.stdout
    done = run_dino("embed", saved_model, address, "--out", tmp_path / "embedded")
    assert done.returncode == 0, done.stderr


def test_places_of_local_files(folder):
    path = folder / "class0/000.jpg"
    content = path.read_bytes()
    assert Reader().read(Place(str(path))) == content
    assert Reader().read(Place(str(path), 5, 10)) == content[5:15]
