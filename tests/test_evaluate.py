"""What evaluations share: results on disk, features that are reused, and two ranks that agree with one."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import dino
from dino import cli
from dino.data.evaluation_views import RESIZES
from dino.data.image_files import open_source
from dino.engine.log import read_metrics
from dino.eval import knn
from dino.features import cache
from dino.features.extract import POOLINGS, extract
from dino.models import VisionTransformer
from dino.models.preprocessing import IMAGENET
from dino.options import replace
from dino.options.evaluate import KnnOptions
from dino.options.train import TrainOptions
from dino.weights import fingerprint
from helpers import TINY, draw_images, run_dino, tiny_flags


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionTransformer(image_size=32, patch_size=8, dim=24, depth=5, num_heads=2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("judged")
    photos = draw_images(root / "photos", 300)
    options = replace(TrainOptions(), TINY | {"epochs": 1, "report": False})
    return dino.train(options, data=str(photos), out=str(root / "run")), photos


def test_result_is_printed_and_written(trained, tmp_path):
    run, photos = trained
    done = run_dino("eval", "knn", run, "--data", photos, "--k", 5, 10)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "eval" / "knn.json").read_text())
    assert result["figures"].keys() == {"knn5_top1", "knn10_top1"}
    assert result["images"] == {"images in the bank": 270, "classified": 30}
    assert result["options"]["k"] == [5, 10]
    assert len(result["model"]["sha256"]) == 64
    assert f"knn5_top1   {result['figures']['knn5_top1']:6.2f}" in done.stdout
    elsewhere = run_dino("eval", "knn", run, "--data", photos, "--k", 5, "--json", tmp_path / "deep" / "r.json")
    assert elsewhere.returncode == 0
    assert json.loads((tmp_path / "deep" / "r.json").read_text())["figures"].keys() == {"knn5_top1"}


def test_two_ranks_give_the_same_result(trained, tmp_path):
    run, photos = trained
    results = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        environment = os.environ | {"DINO_CACHE": str(tmp_path / f"cache{ranks}")}
        done = run_dino("eval", "knn", run, "--data", photos, "--json", file, ranks=ranks, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written") == 1
        results.append(json.loads(file.read_text()))
    assert results[0]["figures"] == results[1]["figures"]
    parts = [sorted((tmp_path / f"cache{ranks}" / "features").iterdir()) for ranks in (1, 2)]
    assert [p.name for p in parts[0]] == [p.name for p in parts[1]]
    for one, two in zip(*parts, strict=True):
        found, expected = load_file(two), load_file(one)
        torch.testing.assert_close(found["values"], expected["values"], rtol=1e-5, atol=1e-6)  # other thread counts
        assert torch.equal(found["indices"], expected["indices"])


def test_features_are_reused_until_something_changes(model, photos, cache_folder, monkeypatch):
    source = open_source(str(photos), "folders")
    digest = fingerprint(model)
    monkeypatch.setattr(cache, "fingerprint", lambda model: digest)

    def features(size=32, pooling="cls"):
        return cache.load_or_extract(model, open_source(str(photos), "folders"), size, pooling, "images")

    first = features()
    np.testing.assert_array_equal(first.values, extract(model, source, 32).values)
    assert len(list(cache_folder.iterdir())) == 1
    model.pos_embed.data.zero_()  # under the old digest: only the cache can still know the old features
    assert torch.equal(features().values, first.values)
    assert not torch.equal(features(size=24).values, first.values)
    assert features(pooling="cls+gem").values.shape == (24, 48)
    digest = fingerprint(model)
    second = features()
    assert not torch.equal(second.values, first.values)
    image = next(photos.rglob("*.jpg"))
    os.utime(image, (1, 1))
    files = len(list(cache_folder.iterdir()))
    features()
    assert len(list(cache_folder.iterdir())) == files + 1


def test_a_damaged_or_unwritable_cache_is_no_obstacle(model, photos, cache_folder, monkeypatch):
    source = open_source(str(photos), "folders")
    first = cache.load_or_extract(model, source, 32, "cls", "images")
    (file,) = cache_folder.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    again = cache.load_or_extract(model, source, 32, "cls", "images")
    assert torch.equal(first.values, again.values)
    (cache_folder.parent.parent / "blocked").write_text("")
    monkeypatch.setenv("DINO_CACHE", str(cache_folder.parent.parent / "blocked"))
    assert torch.equal(cache.load_or_extract(model, source, 32, "cls", "images").values, first.values)


def test_misuse_from_python_is_said(model, photos):
    with pytest.raises(ValueError, match=r"first argument is VisionTransformer; write dino.evaluate\('knn', model"):
        dino.evaluate(model, "knn", data=str(photos))
    with pytest.raises(ValueError, match=r"data is missing; write dino.evaluate\('knn', model, data=...\)"):
        dino.evaluate("knn", model)
    one, several = (dino.evaluate("knn", model, data=str(photos), k=k).figures for k in (3, (3,)))
    assert one == several


def test_poolings_against_plain_code(model):
    images = torch.randn(3, 3, 32, 32)
    last = model.tokens(images)[-1]
    cls, patches = last[:, 0], last[:, 1:]
    power_mean = (patches.clamp(min=1e-6) ** 4).mean(1) ** 0.25
    scales = (images, *(F.interpolate(images, scale_factor=s, mode="bilinear") for s in (2**-0.5, 0.5)))
    four = torch.cat([t[:, 0] for t in model.tokens(images, 4)], dim=1)
    expected = {
        "cls": cls,
        "average": patches.mean(1),
        "gem": power_mean,
        "cls+average": torch.cat([cls, patches.mean(1)], 1),
        "cls+gem": torch.cat([cls, power_mean], 1),
        "last4": four,
        "last4+average": torch.cat([four, patches.mean(1)], 1),
        "any size": cls,
        "three scales": sum(model(scaled[..., :side, :side]) for scaled, side in zip(scales, (32, 16, 16), strict=True))
        / 3,
        "patches": patches,
    }
    assert POOLINGS.keys() == expected.keys()
    for name, read in POOLINGS.items():
        torch.testing.assert_close(read(model, images), expected[name])


def test_any_size_is_cut_to_whole_patches_and_no_less_than_one(model):
    images = torch.randn(2, 3, 37, 47)
    torch.testing.assert_close(POOLINGS["any size"](model, images), model(images[..., :32, :40]))
    assert POOLINGS["three scales"](model, torch.randn(1, 3, 9, 40)).isfinite().all()


def test_views_by_hand():
    image = np.zeros((60, 90, 3), np.uint8)
    image[:30] = 255
    shapes = {name: view(image, 45, IMAGENET).shape for name, view in RESIZES.items()}
    assert shapes == {"as trained": (45, 45, 3), "stretched": (45, 45, 3), "shrunk": (30, 45, 3)}
    assert np.array_equal(RESIZES["shrunk"](image, 200), image)  # never enlarged
    assert RESIZES["stretched"](image, 30)[:14].min() > 200 > 50 > RESIZES["stretched"](image, 30)[16:].max()


def test_images_of_several_shapes_keep_their_order(model, tmp_path):
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate([(32, 40), (32, 40), (40, 32), (32, 40), (8, 70)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(tmp_path / f"{i}.png")
    source = open_source(str(tmp_path), "none")
    together = extract(model, source, 64, pooling="any size", resize="shrunk")
    assert together.indices.tolist() == list(range(5))
    for i in range(5):
        alone = extract(model, source, 64, indices=[i], pooling="any size", resize="shrunk")
        torch.testing.assert_close(together.values[i], alone.values[0], rtol=1e-4, atol=1e-5)


def test_the_same_from_python(trained):
    run, photos = trained
    found = knn.evaluate(dino.load(run), KnnOptions(model=str(run), data=str(photos), k=(5,)), torch.device("cpu"))
    assert 0 <= found.figures["knn5_top1"] <= 100


def test_names_of_the_papers_models():
    with torch.device("meta"):
        assert dino.create("vit_small", patch_size=8).name == "vit_small/8"
        assert dino.create("vit_small", patch_size=8, depth=3).name == ""


def test_a_result_that_cannot_be_written_is_said(trained):
    run, photos = trained
    done = run_dino("eval", "knn", run, "--data", photos, "--k", 5, "--json", "/proc/no/r.json")
    assert done.returncode == 2
    assert "choose another --json" in done.stderr


EXTRA = ["knn --data {0} --k 5", "lowshot --data {0} --percent 100 --k 3 --c 10"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluations_as_training_callbacks(ranks, photos, tmp_path):
    """What a run measures of its last model is what the command finds; on two ranks as on one."""
    wanted = [text.format(photos) for text in EXTRA]
    run, environment = tmp_path / "run", os.environ | {"DINO_CACHE": str(tmp_path / "cache")}
    flags = ["--data", photos, "--out", run, *tiny_flags(epochs=1), "--log.evaluate", *wanted]
    done = run_dino("train", *flags, ranks=ranks, env=environment)
    assert done.returncode == 0, done.stderr
    measured = [line for line in read_metrics(run / "metrics.jsonl") if "knn/knn5_top1" in line]
    assert [line["step"] for line in measured] == [0, measured[-1]["step"]]
    assert not (tmp_path / "cache").exists()  # models in training are not looked at twice
    model = dino.load(run)
    found = dino.evaluate("knn", model, data=str(photos), k=(5,)).figures
    found |= dino.evaluate("lowshot", str(run), data=str(photos), percent=(100,), k=3, c=10).figures
    assert {name.partition("/")[2]: value for name, value in measured[-1].items() if "/" in name} == pytest.approx(
        found
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kn --data x", "Did you mean 'knn'?"),
        ("", "there is no evaluation ''"),
        ("knn", "--data is missing"),
        ("knn --data 'x", "No closing quotation"),
        ("knn --data /nowhere", "data is /nowhere, which does not exist"),
        ("masks --images /nowhere --masks /nowhere", "images is /nowhere, which does not exist"),
        ("knn --data {photos} --k 100000", "k is 100000, but there are only 22 labeled images"),
    ],
)
def test_callbacks_that_cannot_be_are_refused_before_training(text, said, photos, tmp_path, capsys):
    flags = ["--out", str(tmp_path / "run"), *tiny_flags(), "--log.evaluate", text.format(photos=photos)]
    assert cli.main(["train", "--data", str(photos), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
