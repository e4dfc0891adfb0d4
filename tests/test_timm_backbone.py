"""Architectures of timm as backbones: shapes, gradients, refusals, and real runs that train and resume with BatchNorm."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import dino
from dino import cli
from dino.data.normalize import normalize
from dino.engine import parallel
from dino.engine.log import read_metrics
from dino.models.preprocessing import GRAY
from dino.models.timm_backbone import TimmBackbone
from dino.options import replace
from dino.options.train import TrainOptions
from helpers import TINY, assert_same_bits, draw_images, final_state, run_dino, tiny_flags

# name: width, cells per side at 64 pixels, a second size that it takes
FAMILIES = {
    "resnet18": (512, 2, 32),
    "resnet10t": (512, 2, 48),
    "regnetx_002": (368, 2, 32),
    "convnext_atto": (320, 2, 32),
    "efficientnet_lite0": (1280, 2, 32),
    "mobilenetv3_small_050": (1024, 2, 48),
    "swin_tiny_patch4_window7_224": (768, 2, 48),
    "swinv2_tiny_window8_256": (768, 2, 48),
    "xcit_nano_12_p16_224": (128, 4, 48),
    "vit_tiny_patch16_224": (192, 4, 32),
    "deit_tiny_distilled_patch16_224": (192, 4, 32),
    "vit_base_patch16_gap_224": (768, 4, 32),
    "pvt_v2_b0": (256, 2, 32),
    "densenet121": (1024, 2, 32),
    "mixer_s32_224": (512, 2, None),
}
ZERO_BRANCHES = {
    "swinv2_tiny_window8_256"
}  # whose residual branches start at zero, so their inside has no gradient yet


@pytest.fixture(scope="module")
def backbones():
    made: dict[str, TimmBackbone] = {}

    def make(name: str) -> TimmBackbone:
        if name not in made:
            torch.manual_seed(0)
            made[name] = TimmBackbone(name, image_size=64)
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gives_features_and_cells(backbones, name):
    width, side, other = FAMILIES[name]
    model = backbones(name).eval()
    assert (model.embed_dim, model.grid(64, 64), model.patch_size) == (width, (side, side), 64 // side)
    with torch.no_grad():
        for size in filter(None, (64, other)):
            images = torch.randn(2, 3, size, size)
            features, (tokens,) = model(images), model.tokens(images)
            rows, columns = model.grid(size, size)
            assert features.shape == (2, width)
            assert tokens.shape == (2, 1 + rows * columns, width)
            torch.testing.assert_close(tokens[:, 0], features)
            assert features.std() > 0
    if other is None:
        with pytest.raises(ValueError, match=f"timm:{name}, built for 64x64 pixels, does not take images of 48x48"):
            model.grid(48, 48)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ZERO_BRANCHES])
def test_gradients_reach_every_parameter(backbones, name):
    model = backbones(name).train()
    sizes = filter(None, (64, FAMILIES[name][2]))
    sum(model(torch.randn(3, 3, s, s)).square().sum() for s in sizes).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    model.zero_grad()
    # Softmax does not see a shift of all its logits, which is all that a bias of keys can be; norms before norms likewise.
    assert [n for n in without if not n.endswith(".bias")] == []


def test_features_are_timms_own(backbones):
    for name in ("resnet18", "convnext_atto", "xcit_nano_12_p16_224", "mobilenetv3_small_050"):
        model, images = backbones(name).eval(), torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(model(images), model.model(images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "xcit_nano_12_p16_224"])
def test_no_images_have_no_features(backbones, name):
    """As a rank's share of a last batch; many of timm's own fail. The gradients of the others' ranks wait for its zeros."""
    model, none = backbones(name).eval(), torch.zeros(0, 3, 64, 64)
    assert model(none).shape == (0, model.embed_dim)
    (tokens,) = model.tokens(none)
    assert tokens.shape == (0, *model.tokens(torch.zeros(1, 3, 64, 64))[0].shape[1:])
    model.zero_grad()
    model(none).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_cells_of_a_convnet_average_to_the_feature(backbones):
    model, images = backbones("resnet18").eval(), torch.randn(2, 3, 64, 96)
    (tokens,) = model.tokens(images)
    assert model.grid(64, 96) == (2, 3)
    torch.testing.assert_close(tokens[:, 1:].mean(dim=1), tokens[:, 0])


def test_cells_lie_row_by_row_whichever_layout_timm_uses(backbones):
    for name in ("resnet18", "swin_tiny_patch4_window7_224"):
        model = backbones(name).eval()
        images = torch.zeros(1, 3, 64, 64)
        (before,) = model.tokens(images)
        images[:, :, :4, 60:] = 5  # the upper right corner
        (after,) = model.tokens(images)
        assert (after - before).norm(dim=-1)[0, 1:].argmax() == 1, name


def test_attention_of_a_timm_vit_is_ours(backbones):
    """timm's DeiT and our ViT are one architecture: copy the weights, and maps and tokens must agree."""
    theirs = backbones("vit_tiny_patch16_224").eval()
    ours = dino.create("vit_tiny", patch_size=16, image_size=64).eval()
    ours.load_state_dict(theirs.model.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs(images), ours(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.attention(images), ours.attention(images), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(theirs.cls_attention(images), ours.cls_attention(images), atol=1e-6, rtol=1e-5)
    for a, b in zip(theirs.tokens(images, layers=3), ours.tokens(images, layers=3), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="1 to 12 blocks"):
        theirs.tokens(images, layers=13)


def test_attention_leaves_other_prefix_tokens_out(backbones):
    model = backbones("deit_tiny_distilled_patch16_224").eval()
    images = torch.randn(1, 3, 64, 64)
    assert model.attention(images).shape == (1, 3, 18, 18)
    assert model.cls_attention(images).shape == (1, 3, 16)


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"])
def test_what_does_not_exist_is_refused(backbones, name):
    model, images = backbones(name).eval(), torch.zeros(1, 3, 64, 64)
    assert not model.has_attention
    for call in (model.attention, model.cls_attention):
        with pytest.raises(ValueError, match=f"timm:{name}: this model has no attention maps"):
            call(images)
    with pytest.raises(ValueError, match="layers is 2, but earlier layers"):
        model.tokens(images, layers=2)


def test_small_stem():
    model = dino.create("timm:resnet18", image_size=32, stem="small").eval()
    assert model.grid(32, 32) == (4, 4)
    assert model.patch_size == 8
    assert model.model.conv1.weight.shape == (64, 3, 3, 3)
    assert abs(model.model.conv1.weight.std().item() - (2 / (64 * 9)) ** 0.5) < 5e-3
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    # 11,689,512 with classifier (torchvision); without it and with 3x3 for 7x7 in the stem:
    assert sum(p.numel() for p in model.parameters()) == 11_689_512 - 513_000 - 64 * 3 * (49 - 9)


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:vit_tiny_patch16_224", "timm:convnext_atto", "vit_nano"])
def test_any_number_of_channels(name, channels):
    model = dino.create(name, image_size=32, in_channels=channels).eval()
    assert model.in_channels == channels
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, model.embed_dim)


def test_one_channel_is_luma_with_luminous_statistics():
    views = torch.randint(0, 256, (2, 3, 5, 4, 3), dtype=torch.uint8)
    gray = normalize(views, GRAY)
    assert gray.shape == (6, 1, 5, 4)
    weights = torch.tensor([0.299, 0.587, 0.114])
    luma = (views.flatten(0, 1).double() / 255 @ weights.double()).unsqueeze(1)
    # ImageNet's mean and standard deviations, weighed the same way
    torch.testing.assert_close(gray.double(), (luma - 0.458971) / 0.225609, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dino.create("resnet50"), "Did you mean 'timm:resnet50'"),
        (lambda: dino.create("vit_smal"), "Did you mean 'vit_small'"),
        (lambda: dino.create("convnexttiny"), "Did you mean 'timm:convnext_tiny'"),
        (lambda: dino.create("timm:resnet5"), "Did you mean 'resnet50'"),
        (lambda: dino.create("timm:hf_hub:someone/model"), "timm has no architecture"),
        (lambda: dino.create("timm:resnet18", patch_size=8, depth=3), "fixes its own patch_size and depth"),
        (lambda: dino.create("timm:resnet18", pos_interp="size"), "for learned positions"),
        (lambda: dino.create("timm:vit_tiny_patch16_224", image_size=40), "does not take images of 40x40"),
        (lambda: dino.create("timm:crossvit_tiny_240", image_size=64), "timm:crossvit_tiny_240"),
        (lambda: dino.create("timm:coat_tiny"), "several maps"),
        (lambda: dino.create("timm:densenet121", drop_path=0.1), "no stochastic depth"),
        (lambda: dino.create("timm:convnext_atto", stem="small"), "a small stem replaces a ResNet's"),
        (lambda: dino.create("timm:resnet50d", stem="small"), "a small stem replaces a ResNet's"),
        (lambda: dino.create("vit_small", stem="small"), "stem 'small' is for ResNets"),
        (lambda: dino.create("vit_small", in_channels=0), "in_channels is 0; it must be"),
    ],
)
def test_errors_say_value_rule_and_fix(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_importing_the_models_does_not_import_timm():
    code = "import sys, dino.models, dino.weights; print('timm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "efficientnet_lite0"])
def test_synchronized_batch_norm_is_the_same_network(name):
    """Parameters, keys and function survive the conversion, activations inside timm's norms included."""
    torch.manual_seed(0)
    model, images = nn.Sequential(TimmBackbone(name, image_size=64)).eval(), torch.randn(2, 3, 64, 64)
    parameters, keys, before = list(model.parameters()), list(model.state_dict()), model(images)
    parallel.synchronize_batch_norm(model)  # pyright: ignore[reportArgumentType]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in model.modules()) > 10
    assert not any(type(m).__name__.startswith("BatchNorm") for m in model.modules())
    torch.testing.assert_close(model(images), before)


# --- runs ----------------------------------------------------------------------------------------------------------


def timm_flags(arch: str, **changes: object) -> list[str]:
    """A run of seconds as flags, without the options that timm's architectures do not have."""
    flags = tiny_flags(model__arch=arch, **{"views__global_size": 64, "views__local_size": 32} | changes)
    own = {f"--model.{name}" for name in ("width", "depth", "num-heads", "patch-size")}
    return [f for i, f in enumerate(flags) if f not in own and (i == 0 or flags[i - 1] not in own)]


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        (
            "timm:resnet18",
            {"optim__name": "sgd", "model__stem": "small", "views__global_size": 32, "views__local_size": 16},
        ),
        ("timm:xcit_nano_12_p16_224", {}),
        ("timm:convnext_atto", {"model__in_channels": 1}),
        ("timm:swin_tiny_patch4_window7_224", {"views__local_size": 48}),
    ],
)
def test_a_run_trains_and_loads(photos, tmp_path, arch, changes):
    run = tmp_path / "run"
    done = run_dino("train", "--data", photos, "--out", run, *timm_flags(arch, stop_after=3, log__every=1, **changes))
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 3
    model = dino.load(run)
    assert model.name == arch.removeprefix("timm:")
    channels = changes.get("model__in_channels", 3)
    assert model(torch.zeros(1, channels, 64, 64)).shape == (1, model.embed_dim)
    assert model.grid(64, 64) == {"timm:resnet18": (8, 8), "timm:xcit_nano_12_p16_224": (4, 4)}.get(arch, (2, 2))


def test_batch_norm_buffers_are_the_teachers_own_and_resume_to_the_bit(photos, tmp_path):
    sizes = {"views__global_size": 32, "views__local_size": 16}
    flags = timm_flags("timm:resnet18", stop_after=6, head__batch_norm=True, **sizes)
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert run_dino("train", "--data", photos, "--out", whole, *flags).returncode == 0
    flags[flags.index("--stop-after") + 1] = "3"
    assert run_dino("train", "--data", photos, "--out", part, *flags).returncode == 0
    done = run_dino("train", "--resume", part, "--stop-after", "6")
    assert done.returncode == 0, done.stderr
    state = final_state(whole)
    assert_same_bits(state, final_state(part))
    # The student sees two resolutions a step and the teacher one; running statistics are no moving average of each other.
    counts = [int(state[f"{net}.backbone.model.bn1.num_batches_tracked"]) for net in ("student", "teacher")]
    assert counts == [12, 6]
    means = [state[f"{net}.backbone.model.bn1.running_mean"] for net in ("student", "teacher")]
    assert not torch.allclose(*means)


def test_two_cpu_ranks_say_once_that_statistics_are_their_own(photos, tmp_path):
    flags = timm_flags("timm:resnet10t", stop_after=2, threads=1)
    done = run_dino("train", "--data", photos, "--out", tmp_path / "run", *flags, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("BatchNorm runs over each process's own images") == 1


@pytest.mark.slow
def test_a_convnets_report_leaves_attention_out_and_the_command_refuses(tmp_path, capsys):
    run, photo = tmp_path / "run", next(draw_images(tmp_path / "photos").rglob("*.jpg"))
    flags = timm_flags("timm:resnet10t", stop_after=2, report=True, model__in_channels=1, batch_size=8)
    assert cli.main(["train", "--data", "scenes:64", "--out", str(run), *flags]) == 0
    lines = read_metrics(run / "metrics.jsonl")
    assert any("knn20_top1" in line for line in lines)
    assert not any("jaccard_best_head" in line for line in lines)
    page = (run / "report.html").read_text()
    assert "This model has no attention maps" in page
    assert "timm:resnet10t at 64 pixels" in page
    capsys.readouterr()
    assert cli.main(["attention", str(run), str(photo), "--out", str(tmp_path / "maps")]) == 2
    said = capsys.readouterr().err
    assert "this model has no attention maps" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "maps").exists()


@pytest.mark.slow
def test_one_channel_runs_are_evaluated_in_one_channel(tmp_path, capsys):
    run = tmp_path / "run"
    flags = tiny_flags(model__in_channels=1, stop_after=2, report=True, batch_size=8)
    assert cli.main(["train", "--data", "scenes:64", "--out", str(run), *flags]) == 0
    assert dino.load(run).in_channels == 1
    photo = next(draw_images(tmp_path / "photos").rglob("*.jpg"))
    assert cli.main(["attention", str(run), str(photo), "--out", str(tmp_path / "maps")]) == 0
    assert cli.main(["eval", "knn", str(run), "--data", "scenes:64", "--k", "10"]) == 0
    assert "jaccard_best_head" in (run / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.arch", "timm:mixer_s32_224"], "views.local_size is 32: timm:mixer_s32_224, built for 64x64 pixels"),
        (["--model.arch", "timm:mixer_s32_224"], "--views.num-local 0"),
        (["--model.arch", "timm:resnet18", "--model.width", "64"], "timm:resnet18 fixes its own width"),
        (["--model.arch", "resnet18"], "Did you mean 'timm:resnet18'?"),
        (["--model.arch", "timm:resnet18", "--model.in-channels", "4"], "model.in_channels is '4'; choose one of 1, 3"),
    ],
)
def test_misuse_is_one_sentence_and_leaves_nothing(photos, tmp_path, capsys, flags, words):
    base = timm_flags("unset")
    base[base.index("unset") - 1 : base.index("unset") + 1] = []
    assert cli.main(["train", "--data", str(photos), "--out", str(tmp_path / "run"), *base, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_size_architectures_train_without_local_views(photos, tmp_path):
    chosen = replace(TrainOptions(), TINY | {"model.arch": "timm:mixer_s32_224", "views.num_local": 0})
    own = dict.fromkeys(("model.width", "model.depth", "model.num_heads", "model.patch_size"))
    run = dino.train(replace(chosen, own), data=str(photos), out=str(tmp_path / "run"), stop_after=1)
    assert dino.load(run).grid(32, 32) == (1, 1)
