"""Exports: graphs for every size, folders for other libraries, the card, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dino
from dino import cli, weights
from dino.data.decode import decode
from dino.data.evaluation_views import resize_and_crop
from dino.data.normalize import normalize
from dino.exports import card, compare
from dino.exports.positions import interpolate_symbolically
from dino.models import create
from dino.models.positions import interpolate_positions
from dino.options import replace
from dino.options.train import TrainOptions
from helpers import TINY, draw_images, run_dino

SIZES = (32, 32), (56, 32), (16, 40), (88, 64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    photos = draw_images(folder / "photos")
    return dino.train(replace(TrainOptions(), TINY), data=str(photos), out=str(folder / "run"))


def save(folder, **arguments):
    """A model of ours as a folder that `dino.load` takes, every weight drawn anew so that positions matter."""
    torch.manual_seed(0)
    model = create(**arguments)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    folder.mkdir()
    weights.save(folder, model, arguments)
    return folder


@pytest.mark.parametrize("how", ["offset", "size", "antialias"])
@pytest.mark.parametrize("size", [(6, 6), (6, 9), (3, 20), (37, 11), (1, 2)])
def test_positions_of_a_graph_are_the_models(how, size):
    positions = torch.randn(1, 37, 8, generator=torch.Generator().manual_seed(0))
    expected = interpolate_positions(positions, *size, how)
    torch.testing.assert_close(interpolate_symbolically(positions, *size, how), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_onnx_of_a_run_takes_any_number_and_size_of_images(run, tmp_path):
    import onnxruntime

    done = run_dino("export", run, "--to", "onnx", "--out", tmp_path / "a.onnx")
    assert done.returncode == 0, done.stderr
    assert "Largest difference from the model itself:" in done.stdout
    assert all(f"at {size}" in done.stdout for size in ("32x32", "56x32", "16x40"))
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert session.get_inputs()[0].shape == ["number", 3, "height", "width"]
    model = dino.load(run)
    for number, (height, width) in zip((1, 2, 5, 3), SIZES, strict=True):
        images = torch.randn(number, 3, height, width)
        features, tokens = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(features, model(images), rtol=0, atol=1e-5)
        np.testing.assert_allclose(tokens, model.tokens(images)[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["vit_nano", "vit_nano_hybrid"])
def test_torch_export_is_loaded_again_and_agrees(arch, tmp_path):
    source = save(tmp_path / "model", arch=arch, image_size=32, patch_size=8, depth=2, pos_interp="antialias")
    done = run_dino("export", source, "--to", "torch-export", "--out", tmp_path / "a.pt2")
    assert done.returncode == 0, done.stderr
    assert "Largest difference from the model itself:" in done.stdout
    program, model = torch.export.load(tmp_path / "a.pt2").module(), dino.load(source)
    for height, width in SIZES:
        images = torch.randn(2, 3, height, width)
        for found, expected in zip(program(images), (model(images), model.tokens(images)[-1]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["timm:resnet18", "resnet_nano", "vit_nano_hybrid"])
@pytest.mark.parametrize("to", ["onnx", "torch-export", "timm", "safetensors"])
def test_a_convnet_is_exported(to, arch, tmp_path):
    if arch == "vit_nano_hybrid" and to != "safetensors":
        pytest.skip("timm has none; graphs are traced in a process of its own below, where no types are checked")
    source = save(tmp_path / "model", arch=arch, image_size=64)
    out = tmp_path / f"a{compare.FORMATS[to].ending}"
    differences = dino.export(str(source), to, str(out))
    assert [seen.size for seen in differences] == (
        ["64x64", "160x64", "64x96"] if arch == "timm:resnet18" else ["64x64", "112x64", "32x80"]
    )
    assert all(seen.scale > 0.1 and seen.largest < 1e-4 * seen.scale for seen in differences)
    assert out.exists()


def test_the_hugging_face_folder_gives_the_same_features_from_a_picture(run, tmp_path, capsys):
    import transformers

    out = tmp_path / "a-hf"
    assert cli.main(["export", str(run), "--to", "hf", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "0.0e+00 at 32x32" in said or "e-07 at 32x32" in said
    assert "pos_interp='size'" in said
    picture = next(run.parent.glob("photos/*/*.jpg"))
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    theirs = transformers.AutoModel.from_pretrained(out, add_pooling_layer=False).eval()
    image = decode(picture)
    found = theirs(**processor(image, return_tensors="pt")).last_hidden_state[:, 0]
    expected = dino.load(run)(normalize(torch.from_numpy(resize_and_crop(image, 32).copy())[None, None]))
    assert torch.cosine_similarity(found, expected).item() > 0.999


@pytest.mark.parametrize("to", ["timm", "hf"])
@pytest.mark.parametrize("edge", [32, 96, 144, 224])
def test_other_libraries_make_the_same_pixels_of_a_photograph(edge, to, tmp_path):
    """By what the exported folder tells them; small images keep their border, as in `dino eval`."""
    model = weights.read(save(tmp_path / "model", arch="vit_nano", patch_size=16, image_size=edge))
    out = tmp_path / "out"
    compare.FORMATS[to].write(model, out)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)).resize(
        (494, 247)
    )  # no odd margin, which each cuts its own way
    if to == "timm":
        config = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{out}", pretrained=True))
        pixels = timm.data.create_transform(**config)(photo)[None]
    else:
        import transformers

        pixels = transformers.AutoImageProcessor.from_pretrained(out)(photo, return_tensors="pt")["pixel_values"]
    expected = normalize(torch.from_numpy(resize_and_crop(np.asarray(photo), edge).copy())[None, None])
    assert pixels.shape == expected.shape
    # Pillow and torchvision round pixels otherwise now and then; another crop or size differs by far more.
    assert (pixels - expected).abs().mean() < (1e-6 if to == "timm" else 0.02)
    assert (pixels - expected).abs().max() < (1e-5 if to == "timm" else 0.04)


@pytest.mark.parametrize("to", ["timm", "hf"])
def test_pictures_that_are_stretched_and_cut_stay_so(to, tmp_path):
    wanted = {"resize": "stretched", "crop": 0.8, "interpolation": "bilinear", "mean": (0.5, 0.4, 0.3)}
    model = weights.read(save(tmp_path / "model", arch="vit_nano", patch_size=16, image_size=64, **wanted))
    compare.FORMATS[to].write(model, tmp_path / "out")
    again, before = dino.load(tmp_path / "out"), weights.build_backbone(model)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 140, 3), np.uint8)
    assert torch.equal(again.transform(pixels), before.transform(pixels))


def test_the_card_says_how_the_run_was_trained_and_what_was_found(run, tmp_path, capsys):
    assert cli.main(["eval", "knn", str(run), "--data", str(run.parent / "photos"), "--k", "1", "--device", "cpu"]) == 0
    other = json.loads((run / "eval" / "knn.json").read_text())
    other |= {"evaluation": "of-other-weights", "model": {"sha256": "0"}}
    (run / "eval" / "other.json").write_text(json.dumps(other))
    assert cli.main(["export", str(run), "--to", "reference-checkpoint", "--out", str(tmp_path / "a.pth")]) == 0
    text = (tmp_path / "a.pth.md").read_text()
    trained_on = torch.load(next((run / "checkpoints").glob("*.pt")), weights_only=True)["data"]
    knn = json.loads((run / "eval" / "knn.json").read_text())
    for expected in (
        f"| fingerprint of the training data | `{trained_on}` |",
        f"| SHA-256 of the weights | `{knn['model']['sha256']}` |",
        "| epochs | 3 |",
        f"| knn | knn1_top1 | {knn['figures']['knn1_top1']:.4g} | bank `{knn['data']['bank'][:12]}`",
        "teacher_temp = 0.04",
        'dino.load("a.pth")',
    ):
        assert expected in text
    assert "of-other-weights" not in text


def test_the_card_of_a_release_has_the_published_figures_and_the_license():
    text = card.render_card("vits16", "hf", Path("a-hf"), {}, "0", dino.create("vit_nano"), None)
    assert "license: apache-2.0" in text
    assert "| published | k-NN, ImageNet top-1 | 74.5 |" in text
    assert "## Training options" not in text


def test_what_cannot_be_exported_is_refused_in_a_sentence(run, tmp_path, capsys, monkeypatch):
    swin = save(tmp_path / "swin", arch="timm:swin_tiny_patch4_window7_224", image_size=224)
    stem = save(tmp_path / "stem", arch="timm:resnet18", image_size=32, stem="small")
    convnext = save(tmp_path / "convnext", arch="timm:convnext_atto", image_size=64)
    for source, to, out, words in (
        (run, "onnx", "a", "write --out"),
        (run, "onnx", "a.onnx", "pip install 'dino-vision[export]'"),
        (swin, "torch-export", "a.pt2", "windows"),
        (stem, "timm", "a", "stem 'small'"),
        (stem, "hf", "a", "which transformers does not have"),
        (convnext, "reference", "a.pth", "which the reference has not"),
    ):
        for name, needs in (("onnx", ("onnx", "no_such_package")), ("hf", ())):
            monkeypatch.setitem(compare.FORMATS, name, compare.FORMATS[name]._replace(needs=needs))
        assert cli.main(["export", str(source), "--to", to, "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
        assert not (tmp_path / out).exists()


def test_an_export_that_computes_something_else_is_not_kept(run, tmp_path, capsys, monkeypatch):
    wrong = compare.FORMATS["safetensors"]._replace(open=lambda out, found: lambda images: (torch.zeros(1),))
    monkeypatch.setitem(compare.FORMATS, "safetensors", wrong)
    assert cli.main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "a.safetensors")]) == 1
    assert "gives other numbers than the model" in capsys.readouterr().err
    assert not list(tmp_path.glob("a.*"))


def test_an_output_nobody_can_write_is_one_sentence(saved_model, capsys):
    assert cli.main(["export", str(saved_model), "--to", "safetensors", "--out", "/proc/none/x.safetensors"]) == 2
    assert "--out /proc/none/x.safetensors cannot be written" in capsys.readouterr().err
