"""Weights in every format: exact round trips, equal features in timm and transformers, strictness, safe pickles."""

from __future__ import annotations

import argparse
import hashlib
import http.server
import json
import math
import os
import pathlib
import pickle
import shutil
import threading
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.models.xcit import checkpoint_filter_fn

import dino
from dino import cli, names, weights
from dino.data.image_files import open_source
from dino.data.normalize import normalize
from dino.downloads import DownloadError
from dino.engine import init
from dino.engine.build import build_method
from dino.engine.log import read_metrics
from dino.engine.train import Trainer
from dino.exports import compare
from dino.models import Head, create
from dino.models.positions import interpolate_positions
from dino.options import auto, replace
from dino.options.train import TrainOptions
from dino.run import build_batches
from dino.terminal import Terminal
from dino.weights import Weights, formats, read, releases
from helpers import GOLDEN, TINY, assert_same_bits, draw_images, final_state

SIZES = {
    "arch": "vit_nano",
    "patch_size": 8,
    "image_size": 64,
    "width": 96,
    "depth": 4,
    "num_heads": 3,
    "in_channels": 3,
}


def random_state(module: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Values of every entry's own, buffers too, so that no two can be mistaken for each other."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator).mul(0.05).to(value.dtype)
        if value.is_floating_point()
        else torch.full_like(value, seed)
        for name, value in module.state_dict().items()
    }


def vit_weights(**changes: object) -> Weights:
    arguments = SIZES | changes
    state = random_state(create(**arguments), 0)
    return Weights("test", arguments, {f"teacher.backbone.{k}": v for k, v in state.items()})


def full_weights(**changes: object) -> Weights:
    found = vit_weights(**changes)
    head = Head(96, 64, 32, 16, batch_norm=True)
    state = dict(found.state)
    state |= {f"student.backbone.{k}": v for k, v in random_state(create(**found.arguments), 1).items()}
    for seed, role in enumerate(("student", "teacher"), 2):
        state |= {f"{role}.head.{k}": v for k, v in random_state(head, seed).items()}
    return Weights("test", found.arguments, state | {"center.value": torch.randn(64)})


KINDS = ("hf", "reference", "reference-checkpoint", "safetensors", "timm")  # those that hold weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes", [{}, {"width": 128, "num_heads": 2, "depth": 2, "patch_size": 16}], ids=["own", "odd"]
)
def test_a_vit_comes_back_bit_for_bit_from_every_format(kind, sizes, tmp_path):
    given = full_weights(**sizes) if kind == "reference-checkpoint" else vit_weights(**sizes)
    out = tmp_path / ("file.safetensors" if kind == "safetensors" else "out")
    compare.FORMATS[kind].write(given, out)
    found = read(out)
    said, expected = formats.fill_sizes(found.arguments), formats.fill_sizes(given.arguments)
    assert {k: said[k] for k in expected if k != "arch"} == {k: v for k, v in expected.items() if k != "arch"}
    assert_same_bits(found.state, given.state)
    assert found.left_out == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "xcit_nano_12_p8_224", "xcit_nano_12_p16_224"])
@pytest.mark.parametrize("kind", ["reference", "timm", "safetensors"])
def test_resnet_and_xcit_come_back_bit_for_bit(name, kind, tmp_path):
    state = random_state(create(f"timm:{name}"), 0)
    given = Weights("test", {"arch": f"timm:{name}"}, {f"teacher.backbone.{k}": v for k, v in state.items()})
    out = tmp_path / ("file.safetensors" if kind == "safetensors" else "out")
    compare.FORMATS[kind].write(given, out)
    found = read(out)
    assert found.arguments["arch"] == f"timm:{name}"
    assert_same_bits(found.state, given.state)
    assert dino.load(out).embed_dim == create(f"timm:{name}").embed_dim


@pytest.mark.parametrize("kind", ["timm", "safetensors"])
def test_an_architecture_that_only_timm_knows_says_its_name(kind, tmp_path):
    state = random_state(create("timm:convnext_atto"), 0)
    given = Weights("test", {"arch": "timm:convnext_atto"}, {f"teacher.backbone.{k}": v for k, v in state.items()})
    out = tmp_path / ("file.safetensors" if kind == "safetensors" else "out")
    compare.FORMATS[kind].write(given, out)
    assert_same_bits(dino.load(out).state_dict(), state)


def test_keys_of_the_references_xcit_are_what_timm_converts_from():
    """timm ships a converter from the authors' XCiT files; ours must be its inverse."""
    model = timm.create_model("xcit_nano_12_p8_224", num_classes=0)
    state = random_state(model, 0)
    theirs = formats.to_reference({f"model.{name}": value for name, value in state.items()})
    assert any(name.startswith("pos_embeder.") for name in theirs)
    assert_same_bits(checkpoint_filter_fn(dict(theirs), model), state)


def test_resnet50_has_torchvisions_keys():
    theirs = {name for name in torchvision.models.resnet50().state_dict() if not name.startswith("fc.")}
    ours = formats.to_reference(random_state(create("timm:resnet50"), 0))
    assert ours.keys() == theirs


def test_the_references_own_keys_are_ours():
    """Its ViT's keys and shapes, as recorded from the reference itself, load as they are."""
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())["vit_tiny16"]
    found = formats.recognize({name: torch.zeros(shape) for name, shape in shapes.items()}, "test")[0]
    assert (found["arch"], found["patch_size"], found["image_size"], found["num_heads"]) == ("vit_tiny", 16, 224, 3)


# -------------------------------------------------------------------------- the same features in other libraries


@pytest.mark.parametrize("size", [64, 96, 40])
def test_timm_computes_the_same_features(size, tmp_path):
    compare.FORMATS["timm"].write(vit_weights(), tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, dynamic_img_size=True).eval()
    ours = dino.load(tmp_path / "out", pos_interp="antialias")
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [64, 96, 40])
def test_transformers_computes_the_same_features(size, tmp_path):
    import transformers

    compare.FORMATS["hf"].write(vit_weights(), tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    ours = dino.load(tmp_path / "out", pos_interp="size")
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours.tokens(images)[-1], found, rtol=0, atol=1e-5)


def test_transformers_prepares_images_alike(tmp_path):
    import transformers

    from dino.data.evaluation_views import resize_and_crop

    compare.FORMATS["hf"].write(vit_weights(image_size=224), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    ours = normalize(torch.from_numpy(resize_and_crop(image, 224).copy())[None, None])
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().mean() < 0.02


def test_a_model_that_transformers_saved_loads_and_its_pooler_is_named(tmp_path):
    import transformers

    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 384}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    theirs = transformers.ViTModel(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    found = read(tmp_path / "hf")
    assert found.left_out == ("pooler.dense.bias", "pooler.dense.weight")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            dino.load(tmp_path / "hf")(images), theirs(images).last_hidden_state[:, 0], rtol=0, atol=1e-5
        )


# ------------------------------------------------------------------------------------------- strict, and safe


def test_a_full_checkpoint_of_the_reference_with_its_flags_is_read(tmp_path):
    given = full_weights()
    compare.FORMATS["reference-checkpoint"].write(given, tmp_path / "checkpoint.pth")
    with pytest.raises(pickle.UnpicklingError):  # it holds an argparse.Namespace, as the reference's do
        torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    found = read(tmp_path / "checkpoint.pth")
    assert found.state.keys() == given.state.keys()
    sizes = formats.infer_head(found.part("teacher.head."))
    assert (sizes["out_dim"], sizes["hidden_dim"], sizes["bottleneck_dim"]) == (64, 32, 16)


def test_wrapped_names_and_a_classifier_are_tolerated_and_the_latter_named(tmp_path):
    given = vit_weights()
    state = {f"module.backbone.{k}": v for k, v in given.backbone().items()}
    torch.save({"state_dict": state | {"module.head.weight": torch.zeros(10, 96)}}, tmp_path / "a.pth")
    found = read(tmp_path / "a.pth")
    assert_same_bits(found.state, given.state)
    assert found.left_out == ("head.weight",)


def test_what_does_not_fit_is_named(tmp_path):
    state = vit_weights().backbone()
    torch.save(state | {"blocks.0.surprise": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(ValueError, match=r"1 unknown \(blocks\.0\.surprise\)"):
        dino.load(tmp_path / "more.pth")
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, tmp_path / "less.pth")
    with pytest.raises(ValueError, match=r"1 missing \(norm\.bias\)"):
        dino.load(tmp_path / "less.pth")
    torch.save(state | {"norm.bias": torch.zeros(7)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match=r"norm\.bias is \[7\], expected \[96\]"):
        dino.load(tmp_path / "shape.pth")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no ViT, XCiT or ResNet"):
        dino.load(tmp_path / "other.pth")


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("evil.pth", {"teacher": Evil()}), ("args.pth", {"args": argparse.Namespace(x=Evil())})):
        torch.save(content, name)
        with pytest.raises(ValueError, match="could run code"):
            read(name)
    with open("old.pth", "wb") as file:  # the format before zip files
        pickle.dump(Evil(), file)
    with pytest.raises(ValueError, match=r"could run code|damaged"):
        read("old.pth")
    assert not (tmp_path / "owned").exists()
    assert cli.main(["export", "evil.pth", "--to", "timm", "--out", "out"]) == 2


def test_damaged_files_are_refused_kindly(tmp_path):
    compare.FORMATS["safetensors"].write(vit_weights(), tmp_path / "a.safetensors")
    compare.FORMATS["reference"].write(vit_weights(), tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match="damaged"):
            dino.load(path)


def test_flags_with_paths_and_numpy_numbers_are_harmless(tmp_path):
    flags = argparse.Namespace(output_dir=pathlib.PosixPath("/x"), lr=np.float64(0.1))
    torch.save({"teacher": vit_weights().backbone(), "args": flags}, tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").backbone().keys() == vit_weights().backbone().keys()


def test_a_linear_classifier_is_no_backbone(tmp_path):
    state = {"module.linear.weight": torch.randn(10, 96), "module.linear.bias": torch.randn(10)}
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="linear classifier, not a backbone"):
        dino.load(tmp_path / "a.pth")


# ------------------------------------------------------------------------------------------------- downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file with ranges; can cut the first connections short, or damage what it sends."""

    content = b""
    cuts = 0
    damage = False
    asked: ClassVar[list[str | None]] = []

    def do_GET(self):
        kind = type(self)
        kind.asked.append(self.headers.get("Range"))
        if not self.path.endswith("dino_deitsmall16_pretrain.pth"):
            self.send_error(404)
            return
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        body = kind.content[start:]
        if kind.damage:
            body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind.cuts:
            kind.cuts -= 1
            body = body[: len(body) // 3]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    compare.FORMATS["reference"].write(vit_weights(), tmp_path / "served.pth")

    class Own(Server):
        content = (tmp_path / "served.pth").read_bytes()
        asked: ClassVar[list[str | None]] = []

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("DINO_RELEASES", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
        yield Own
        running.shutdown()


def test_a_release_is_downloaded_once_and_checked_after(server, tmp_path):
    model = dino.load("vits16")
    assert model.embed_dim == 96  # what our server has under that name
    (recorded,) = (tmp_path / "cache").glob("*.sha256")
    assert recorded.read_text().split()[0] == hashlib.sha256(server.content).hexdigest()
    dino.load("dino_vits16")
    assert len(server.asked) == 1
    path = releases.fetch_release("vits16")
    path.write_bytes(server.content[:-1] + b"x")
    with pytest.raises(DownloadError, match="has changed since it was downloaded"):
        dino.load("vits16")


def test_a_cut_connection_is_continued_where_it_stopped(server):
    server.cuts = 2
    assert releases.fetch_release("vits16").read_bytes() == server.content
    assert server.asked[0] is None
    assert [int(r.removeprefix("bytes=").rstrip("-")) > 0 for r in server.asked[1:]] == [True, True]


def test_a_connection_that_stays_cut_keeps_what_arrived(server, tmp_path):
    server.cuts = 3
    with pytest.raises(DownloadError, match="connection was cut"):
        releases.fetch_release("vits16")
    assert list((tmp_path / "cache").glob("*.part"))
    assert releases.fetch_release("vits16").read_bytes() == server.content  # the next call goes on


def test_a_file_damaged_on_the_way_is_not_kept(server, tmp_path):
    server.damage = True
    with pytest.raises(DownloadError, match="damaged"):
        releases.fetch_release("vits16")
    assert not list((tmp_path / "cache").glob("*.pth*"))


def test_without_network_or_permission_to_use_it(server, tmp_path, monkeypatch, capsys):
    with pytest.raises(DownloadError, match="downloads are off"):
        dino.load("vits16", offline=True)
    monkeypatch.setenv("DINO_OFFLINE", "1")
    assert cli.main(["models", "vits16"]) == 1
    assert "downloads are off" in capsys.readouterr().err
    monkeypatch.delenv("DINO_OFFLINE")
    with pytest.raises(DownloadError, match="404"):
        releases.fetch_release("vits8")
    monkeypatch.setenv("DINO_RELEASES", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(DownloadError, match="check the network"):
        releases.fetch_release("vits16")
    with pytest.raises(ValueError, match="no part 'x'"):
        names.find_release("vits16:x")


def test_models_are_listed(server, capsys):
    releases.fetch_release("vits16")
    assert cli.main(["models"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names.RELEASES)
    assert "backbone*" in said
    assert "74.5" in said


# --------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_a_run_is_converted_and_used_everywhere(photos, tmp_path, capsys):
    run = dino.train(replace(TrainOptions(), TINY | {"report": False}), data=str(photos), out=str(tmp_path / "run"))
    for kind in KINDS:
        # With student and heads, a run keeps the last only.
        expected = dino.load(f"{run}:last" if kind == "reference-checkpoint" else run).state_dict()
        out = tmp_path / f"{kind}{'.safetensors' if kind == 'safetensors' else ''}"
        assert cli.main(["export", str(run), "--to", kind, "--out", str(out)]) == 0
        found = read(out, num_heads=2)
        model = create(**found.arguments)
        weights.load_strictly(model, found.backbone(), kind)
        assert_same_bits(model.state_dict(), expected)
    assert cli.main(["export", str(run), "--to", "timm", "--out", str(tmp_path / "timm")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main(["export", str(tmp_path / "nothing"), "--to", "timm", "--out", str(tmp_path / "x")]) == 2
    assert "dino models" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ training that starts there


def first_loss(photos, out, **changes) -> float:
    run = dino.train(
        replace(TrainOptions(), TINY | {"report": False, "stop_after": 1, "log.every": 1} | changes),
        data=str(photos),
        out=str(out),
    )
    return read_metrics(run / "metrics.jsonl")[-1]["loss"]


@pytest.mark.slow
def test_continued_training_starts_at_the_old_loss(photos, tmp_path, capsys):
    """With heads and center the loss goes on where it was, also by way of the reference's format; docs/weights.md shows a
    run of some length, with the center found again, and the fall back without heads."""
    same = {"method.momentum": 0.9, "method.teacher_temp": 0.07, "method.teacher_temp_start": 0.07, "optim.lr": 0.03}
    teach = TINY | same | {"epochs": 40, "batch_size": 16, "stop_after": 40, "log.every": 1}
    draw_images(photos, 64)
    run = dino.train(replace(TrainOptions(), teach), data=str(photos), out=str(tmp_path / "run"))
    old = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line][
        -1
    ]  # a mean would lag behind
    limit = math.log(TINY["head.out_dim"])
    assert old < 0.75 * limit
    same["batch_size"] = 16
    continued = first_loss(photos, tmp_path / "a", init=str(run), **same)
    assert abs(continued - old) < 0.1 * limit
    for kind in ("reference-checkpoint", "reference"):
        assert cli.main(["export", str(run), "--to", kind, "--out", str(tmp_path / f"{kind}.pth")]) == 0
    content = torch.load(tmp_path / "reference-checkpoint.pth", weights_only=False)
    del content["dino_loss"]
    torch.save(content, tmp_path / "no-center.pth")
    capsys.readouterr()
    first_loss(photos, tmp_path / "b", init=str(tmp_path / "no-center.pth"), **{"model.num_heads": 2} | same)
    assert "The center is the mean over" in capsys.readouterr().err
    by_way = first_loss(
        photos, tmp_path / "c", init=str(tmp_path / "reference-checkpoint.pth"), **{"model.num_heads": 2} | same
    )
    assert by_way == pytest.approx(continued, rel=1e-5)


def test_a_missing_center_is_the_mean_of_the_teachers_outputs(photos, tmp_path):
    options = replace(TrainOptions(), TINY | {"data.path": str(photos), "method.teacher_temp_epochs": 0})
    source = open_source(str(photos))
    batches = build_batches(replace(options, {"views.num_local": 0}), source, torch.device("cpu"))
    options = replace(options, {"optim.warmup_epochs": 0})
    trainer = Trainer(options, tmp_path / "run", source, batches, torch.device("cpu"), Terminal(False))
    trainer.method.center.value.fill_(7)
    assert init.estimate_center(trainer, batches) == 2 * 4 * (24 // 4)
    outputs = [trainer.method.teacher([normalize(batches[step].prepared[0])]) for step in range(24 // 4)]
    torch.testing.assert_close(trainer.method.center.value, torch.cat(outputs).mean(dim=0))


def test_start_of_another_shape_is_refused(photos, tmp_path):
    run = dino.train(
        replace(TrainOptions(), TINY | {"report": False, "epochs": 1}), data=str(photos), out=str(tmp_path / "run")
    )
    for changes, words in (({"model.width": 48}, "model.width is 48"), ({"head.out_dim": 33}, "head.out_dim is 33")):
        with pytest.raises(ValueError, match=words):
            dino.train(
                replace(TrainOptions(), TINY | {"init": str(run)} | changes), data=str(photos), out=str(tmp_path / "x")
            )
        assert not (tmp_path / "x").exists()


def test_a_run_begun_from_weights_resumes_to_the_bit(photos, tmp_path):
    begin = dino.train(
        replace(TrainOptions(), TINY | {"report": False, "epochs": 1}), data=str(photos), out=str(tmp_path / "begin")
    )
    options = replace(TrainOptions(), TINY | {"report": False, "init": str(begin)})
    whole = dino.train(options, data=str(photos), out=str(tmp_path / "whole"))
    part = dino.train(replace(options, {"stop_after": 4}), data=str(photos), out=str(tmp_path / "part"))
    shutil.rmtree(begin)  # not needed any more
    assert cli.main(["train", "--resume", str(part), "--no-report", "--stop-after", "1000"]) == 0
    assert_same_bits(final_state(whole), final_state(part))


def test_other_sizes_are_interpolated(tmp_path):
    given = full_weights()
    options = replace(TrainOptions(), {"init": "x", "views.global_size": 96, "head.out_dim": 64, "model.num_heads": 3})
    adopted = init.adopt(options, given)
    assert (adopted.model.patch_size, adopted.head.hidden_dim, adopted.head.batch_norm) == (8, 32, True)
    method = build_method(auto.resolve(replace(adopted, {"views.local_size": 48}), 1000, 300, on_gpu=False, cores=1))
    init.initialize(method, given)
    expected = interpolate_positions(given.backbone()["pos_embed"], 12, 12, "offset")
    assert torch.equal(method.teacher.backbone.pos_embed, expected)
