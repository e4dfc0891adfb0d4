"""Weights by name from a hub: networks of transformers and timm compute here what they compute there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from transformers import (
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
    ViTConfig,
)

import dino
from dino import cli
from dino.data.decode import BadImage
from dino.downloads import DownloadError
from dino.models.timm_names import split_arguments
from dino.weights.families import convert_dinov2
from hub import Hub

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TRANSFORMERS = {
    "vit": ViTConfig(**SMALL, intermediate_size=128, image_size=80, layer_norm_eps=1e-6),
    "dinov2": Dinov2Config(**SMALL, patch_size=14, image_size=70),
    "dinov2-swiglu": Dinov2Config(**SMALL, patch_size=14, image_size=70, use_swiglu_ffn=True),
    "dinov2-registers": Dinov2WithRegistersConfig(**SMALL, patch_size=14, image_size=70, num_register_tokens=3),
    "dinov3": DINOv3ViTConfig(**SMALL, intermediate_size=128, image_size=64, num_register_tokens=4),
    "dinov3-gated": DINOv3ViTConfig(
        **SMALL, intermediate_size=96, image_size=64, num_register_tokens=2, use_gated_mlp=True, hidden_act="silu"
    ),
    "dinov3-convnext": DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1], image_size=64),
}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM = {
    "deit": ("deit_tiny_patch16_224", TINY | {"img_size": 64}),
    "dinov2": ("vit_small_patch14_dinov2", TINY | {"img_size": 70}),
    "dinov2-registers": ("vit_small_patch14_reg4_dinov2", TINY | {"img_size": 70}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", TINY | {"img_size": 70}),
    "dinov3": ("vit_small_patch16_dinov3", TINY | {"global_pool": "token"}),
    "dinov3-swiglu": ("vit_small_plus_patch16_dinov3_qkvb", TINY | {"global_pool": "token"}),
    "clip": ("vit_base_patch16_clip_224", TINY | {"img_size": 64}),
    "siglip": ("vit_base_patch16_siglip_224", TINY | {"img_size": 64}),
    "convnext": ("convnext_atto", {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}),
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "served") as hub:
        hub.use_here(monkeypatch, tmp_path / "home")
        yield hub


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of every parameter's own, so that no two can be mistaken for each other."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def draw_photo(folder):
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (14, 19, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((190, 140), Image.Resampling.BICUBIC).save(folder / "a.png")
    return folder / "a.png"


def make_images(model, number=2):
    """Images of three sizes: square, higher and wider."""
    cells = 4 if model.patch_size < 30 else 2
    for rows, columns in ((cells, cells), (cells + 2, cells + 1), (cells - 1, cells + 3)):
        yield torch.randn(number, 3, rows * model.patch_size, columns * model.patch_size), (rows, columns)


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_what_transformers_computes(name, hub):
    config = TRANSFORMERS[name]
    own = randomize(transformers.AutoModel.from_config(config, attn_implementation="eager"))
    own.save_pretrained(hub.root / "org" / name)
    model = dino.load(f"hf:org/{name}")
    more = {"interpolate_pos_encoding": True} if name == "vit" else {}
    for images, grid in make_images(model):
        attentions = {"output_attentions": True} if model.has_attention else {}
        expected = own(images, **more, **attentions)
        tokens = expected.last_hidden_state
        registers = tokens.shape[1] - 1 - grid[0] * grid[1]
        tokens = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)
        torch.testing.assert_close(model.tokens(images)[-1], tokens, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(images), tokens[:, 0], atol=1e-5, rtol=0)
        assert model.grid(*images.shape[-2:]) == grid
        if model.has_attention:
            torch.testing.assert_close(model.attention(images), expected.attentions[-1], atol=1e-5, rtol=0)
            seen = expected.attentions[-1][:, :, 0, 1 + registers :]
            torch.testing.assert_close(model.cls_attention(images), seen, atol=1e-5, rtol=0)
            assert len(model.tokens(images, layers=2)) == 2
    assert model.has_attention == (name != "dinov3-convnext")


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_what_came_from_transformers_goes_back(name, tmp_path):
    own = randomize(transformers.AutoModel.from_config(TRANSFORMERS[name], attn_implementation="eager"))
    own.save_pretrained(tmp_path / "given")
    dino.export(tmp_path / "given", "hf", tmp_path / "out")
    back = transformers.AutoModel.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    more = {"interpolate_pos_encoding": True} if name == "vit" else {}
    assert type(back) is type(own)
    for images, _ in make_images(dino.load(tmp_path / "given")):
        expected, given = own(images, **more).last_hidden_state, back(images, **more).last_hidden_state
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers", "dinov2-swiglu", "dinov3", "dinov3-swiglu", "convnext"])
@torch.no_grad()
def test_timms_networks_become_those_of_transformers(name, tmp_path):
    arch, arguments = TIMM[name]
    if name == "convnext":  # the smallest have convolutions for their MLPs
        arch = "convnext_tiny"
    elif name == "dinov2-swiglu":  # transformers has widths of 8
        arguments = arguments | {"mlp_ratio": 5.5}
    own = randomize(timm.create_model(arch, num_classes=0, **arguments))
    timm.models.save_for_hf(own, tmp_path / "given", model_args=arguments)
    seen = dino.export(tmp_path / "given", "hf", tmp_path / "out")
    assert max(difference.alike for difference in seen) < 1e-5
    size = dino.load(tmp_path / "given").image_size
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(dino.load(tmp_path / "out")(images), own(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["deit", "clip", "siglip"])
def test_what_transformers_lacks_is_refused(name, tmp_path):
    arch, arguments = TIMM[name]
    own = timm.create_model(arch, num_classes=0, **arguments)
    timm.models.save_for_hf(own, tmp_path / "given", model_args=arguments)
    with pytest.raises(ValueError, match=r"no counterpart that hf is written for.*use --to timm"):
        dino.export(tmp_path / "given", "hf", tmp_path / "out")


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_what_timm_computes_and_reads_back(name, hub, tmp_path):
    arch, arguments = TIMM[name]
    folder = hub.root / "timm" / name
    timm.models.save_for_hf(
        randomize(timm.create_model(arch, num_classes=0, **arguments)), folder, model_args=arguments
    )
    model = dino.load(f"hf:timm/{name}")
    dino.export(f"hf:timm/{name}", "timm", tmp_path / "out")
    sizes = {} if name == "convnext" else {"dynamic_img_size": True}
    for place in (f"hf-hub:timm/{name}", f"local-dir:{tmp_path / 'out'}"):
        own = timm.create_model(place, pretrained=True, num_classes=0, **sizes).eval()
        for images, _ in make_images(model):
            torch.testing.assert_close(model(images), own(images), atol=1e-5, rtol=0)
            if model.has_attention:
                rows = model.cls_attention(images).sum(dim=-1)
                assert rows.shape == (2, 2)
                assert (rows < 1 + 1e-6).all()
    assert model.has_attention == (name not in ("convnext", "siglip"))
    again = dino.load(tmp_path / "out")
    assert again.preprocessing == model.preprocessing


def test_released_sizes_have_timms_names():
    config = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
    state = {"encoder.layer.0.mlp.fc1.weight": torch.zeros(4 * 384, 384)}
    assert convert_dinov2(config, state)[0] == "timm:vit_small_patch14_dinov2"
    assert split_arguments("a(b=(1, 2), c='d')") == ("a", {"b": (1, 2), "c": "d"})
    for text in ("a(b)", "a(1)", "a(b=print())", "a(b=1"):
        with pytest.raises(ValueError, match=r"write arguments as timm:a\(depth=4\)"):
            split_arguments(text)


@torch.no_grad()
def test_timms_weights_by_name_tag_and_revision(hub, capsys):
    net = "test_vit.r160_in1k"
    for revision, scale in (("", 1.0), ("@v1", 2.0)):
        own = randomize(timm.create_model("test_vit", num_classes=0))
        own.norm.weight.mul_(scale)
        timm.models.save_for_hf(own, hub.root / "timm" / f"{net}{revision}")
    new, old = dino.load(f"timm:{net}"), dino.load(f"timm:{net}@v1")
    images = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(new(images), timm.create_model(net, pretrained=True, num_classes=0).eval()(images))
    assert not torch.equal(new.model.norm.weight, old.model.norm.weight)
    assert (new.image_size, new.preprocessing.crop) == (160, 0.95)
    with pytest.raises(ValueError, match=r"timm has no weights 'timm:test_vit\.none'; it has test_vit\.r160_in1k"):
        dino.load("timm:test_vit.none")
    with pytest.raises(ValueError, match=r"no architecture 'resnet19'\. Did you mean 'resnet18'"):
        dino.load("timm:resnet19")


@pytest.mark.parametrize(
    ("processor", "kind"),
    [
        (
            {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True},
            "BitImageProcessor",
        ),
        ({"size": {"height": 56, "width": 56}, "resample": 2}, "DINOv3ViTImageProcessor"),
        (
            {"size": {"height": 72, "width": 72}, "crop_size": {"height": 56, "width": 56}, "do_center_crop": True},
            "DeiTImageProcessor",
        ),
        (
            {"size": {"height": 42, "width": 42}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
            "SiglipImageProcessor",
        ),
    ],
)
@torch.no_grad()
def test_pictures_are_prepared_as_the_weights_want(processor, kind, hub, tmp_path):
    own = randomize(transformers.Dinov2Model(TRANSFORMERS["dinov2"]))
    own.save_pretrained(hub.root / f"org/{kind}")
    given = {"image_processor_type": kind, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "resample": 3}
    (hub.root / f"org/{kind}/preprocessor_config.json").write_text(json.dumps(given | processor))
    path = draw_photo(tmp_path / "photos")
    prepare = transformers.AutoImageProcessor.from_pretrained(f"org/{kind}")
    pixels = prepare(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    expected = own(pixels).pooler_output
    model = dino.load(f"hf:org/{kind}")
    assert (model.transform(path) - pixels[0]).abs().mean() < 0.03  # another crop differs by tenths
    assert torch.cosine_similarity(model.embed([path]), expected).item() > 1 - 1e-3
    assert torch.cosine_similarity(model.embed([Image.open(path)]), expected).item() > 1 - 1e-3
    dino.embed(f"hf:org/{kind}", tmp_path / "photos", tmp_path / "embedding")
    assert json.loads(json.dumps(model.preprocessing.mean)) == list(prepare.image_mean)


@pytest.mark.parametrize(
    ("repository", "token", "words"),
    [
        ("org/none", None, "there is no repository org/none that you may read at http"),
        ("org/gated", None, "org/gated is gated: ask for access on http"),
        ("org/gated", "hf_reader", "org/gated is gated: ask for access on http"),
        ("org/net@v9", None, "org/net has no revision 'v9'"),
        ("org/net", "hf_wrong", "refused the token that you are logged in with"),
        ("a/b/c", None, "'a/b/c' is no name of a repository; write ORG/NAME"),
        ("org/empty", None, "org/empty has none of model.safetensors"),
        ("org/bert", None, "is of Hugging Face's type bert; known are vit, dinov2"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_sentence(repository, token, words, hub, tmp_path, monkeypatch, capsys):
    for name, config in (
        ("net", {"model_type": "vit"}),
        ("gated", {}),
        ("empty", None),
        ("bert", {"model_type": "bert"}),
    ):
        (hub.root / "org" / name).mkdir(parents=True)
        (hub.root / "org" / name / "config.json").write_text(json.dumps(config))
        if name != "empty":
            (hub.root / "org" / name / "model.safetensors").write_bytes(b"0")
    hub.gated["org/gated"] = set()
    hub.use_here(monkeypatch, tmp_path / "home", token)
    assert cli.main(["eval", "knn", f"hf:{repository}", "--data", str(tmp_path)]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert error.splitlines()[-1].startswith("dino: ")
    assert "Traceback" not in error


def test_without_a_network_the_cache_is_enough(hub, monkeypatch):
    randomize(transformers.Dinov2Model(TRANSFORMERS["dinov2"])).save_pretrained(hub.root / "org/net")
    before = dino.load("hf:org/net")
    hub.broken = 503
    assert torch.equal(dino.load("hf:org/net", offline=True).model.norm.weight, before.model.norm.weight)
    with pytest.raises(DownloadError, match="org/other is not in the cache, and offline mode is on"):
        dino.load("hf:org/other", offline=True)
    with pytest.raises(DownloadError, match="org/other"):
        dino.load("hf:org/other")


def test_a_cache_without_the_processor_is_no_cache(hub, tmp_path):
    """Else the pictures would be prepared in another way, and nobody would know."""
    randomize(transformers.Dinov2Model(TRANSFORMERS["dinov2"])).save_pretrained(hub.root / "org/half")
    (hub.root / "org/half/preprocessor_config.json").write_text(json.dumps({"size": {"height": 56, "width": 56}}))
    assert dino.load("hf:org/half").view_size == 56
    next((tmp_path / "home").rglob("preprocessor_config.json")).unlink()
    with pytest.raises(DownloadError, match="org/half is not in the cache"):
        dino.load("hf:org/half", offline=True)
    (hub.root / "org/plain").mkdir()
    for name in ("config.json", "model.safetensors"):
        (hub.root / "org/plain" / name).write_bytes((hub.root / "org/half" / name).read_bytes())
    assert dino.load("hf:org/plain").view_size == dino.load("hf:org/plain", offline=True).view_size == 70


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "relu"), ("layer_norm_eps", 1e-3)])
def test_what_timm_cannot_be_told_is_refused(key, value, tmp_path):
    config = TRANSFORMERS["dinov2"].to_dict() | {key: value}
    transformers.Dinov2Model(TRANSFORMERS["dinov2"]).save_pretrained(tmp_path / "net")
    (tmp_path / "net/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config.json says {key} {value}; only {key} "):
        dino.load(tmp_path / "net")


def test_classifiers_are_dropped_and_broken_configurations_named(tmp_path):
    arch, arguments = TIMM["dinov2"]
    timm.models.save_for_hf(timm.create_model(arch, num_classes=7, **arguments), tmp_path / "net", model_args=arguments)
    assert dino.load(tmp_path / "net").embed_dim == 32
    for text, words in (("{", "is no JSON"), ("3", "holds int and no configuration")):
        (tmp_path / "net/config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"net/config\.json {words}"):
            dino.load(tmp_path / "net")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16", "F"])
def test_a_picture_in_memory_is_that_of_its_file(mode, saved_model, tmp_path):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 50, 4), dtype=np.uint8), "RGBA").convert(
        "RGB" if mode == "P" else "RGBA"
    )
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 65536, (40, 50), dtype=np.uint16))
    elif mode != "RGBA":
        picture = picture.convert("L" if mode == "F" else "RGB").convert(mode)
    path = tmp_path / f"a.{'tif' if mode in ('CMYK', 'F') else 'png'}"
    picture.save(path)
    model = dino.load(saved_model)
    assert torch.equal(model.transform(path), model.transform(Image.open(path)))


def test_misuse_of_pictures_is_said(saved_model, tmp_path):
    model, pixels = dino.load(saved_model), np.zeros((40, 40, 3), np.uint8)
    assert model.embed(pixels).shape == model.embed(Image.fromarray(pixels)).shape == (1, model.embed_dim)
    assert torch.equal(model.embed(x for x in [pixels, pixels]), model.embed(np.stack([pixels, pixels])))
    assert model.half().embed(pixels).dtype == torch.float32
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(BadImage, match=r"a\.jpg: not an image"):
        model.embed([pixels, tmp_path / "a.jpg"])
    with pytest.raises(ValueError, match=r"an array of float64 \[40, 40\] is no picture; give uint8"):
        model.transform(np.zeros((40, 40)))
    for given, words in (
        (tmp_path / "a.jpg", r"model\.embed"),
        ([pixels], r"model\.embed"),
        (torch.zeros(3, 48, 48), r"\[None\]"),
    ):
        with pytest.raises(ValueError, match=words):
            model(given)


def test_what_was_loaded_can_be_trained_and_transforms_pictures(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=0), tmp_path / "net")
    model = dino.load(tmp_path / "net")
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    draw = model.transform(train=True)
    views = [draw(Image.fromarray(pixels)) for _ in range(4)]
    assert {view.shape for view in views} == {(3, 160, 160)}
    assert not torch.equal(views[0], views[1])
    assert torch.equal(model.transform(pixels), model.transform(Image.fromarray(pixels)))
    assert model.embed([]).shape == (0, model.embed_dim)
