"""Backbone and head against the reference's outputs on weights anyone can rebuild."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.profiler import profile

from dino.engine import parallel
from dino.models import Head, VisionTransformer, create, vit
from dino.models.head import Prototypes
from dino.models.vit import Attention, DropPath
from helpers import GOLDEN, golden_images, load_golden_weights

SIZES = [(224, 224), (96, 96), (160, 256)]


@pytest.fixture(scope="module")
def vit_tiny() -> VisionTransformer:
    model = create("vit_tiny", patch_size=16).eval()
    load_golden_weights(model)
    return model


@pytest.mark.parametrize(("height", "width"), SIZES)
@torch.no_grad()
def test_vit_matches_reference(golden, vit_tiny, height, width):
    expected, size = golden("vit_tiny16"), f"{height}x{width}"
    x = golden_images(height + width, 2, 3, height, width)
    layers = vit_tiny.tokens(x, layers=4)
    found = {
        "cls": vit_tiny(x),
        "cls_attention": vit_tiny.attention(x)[:, :, 0],
        "last4_cls": torch.stack([t[:, 0] for t in layers]),
        "last_patch_mean": layers[-1][:, 1:].mean(dim=1),
    }
    for name, value in found.items():
        np.testing.assert_allclose(value.numpy(), expected[f"{name}_{size}"], atol=1e-5, rtol=1e-5, err_msg=name)


def test_state_dict_is_the_references(vit_tiny):
    shapes = json.loads((GOLDEN / "state_dict_shapes.json").read_text())
    assert {k: list(v.shape) for k, v in vit_tiny.state_dict().items()} == shapes["vit_tiny16"]
    head = Head(64, 512, hidden_dim=128, bottleneck_dim=32)
    assert {k: list(v.shape) for k, v in head.state_dict().items()} == shapes["head"]


@pytest.mark.parametrize("norm", [True, False])
def test_head_matches_reference(golden, norm):
    expected = golden(f"head_norm{int(norm)}")
    head = Head(64, 512, hidden_dim=128, bottleneck_dim=32, norm_last_layer=norm)
    load_golden_weights(head)
    y = head(torch.from_numpy(expected["x"]))
    np.testing.assert_allclose(y.detach().numpy(), expected["y"], atol=1e-5, rtol=1e-5)
    trainable = [name for name, p in head.named_parameters() if p.requires_grad]
    assert sorted(trainable) == sorted(expected["trainable"].tolist())


@pytest.mark.parametrize(
    ("name", "patch", "millions"),
    [
        ("vit_tiny", 16, 5.524416),
        ("vit_small", 16, 21.665664),
        ("vit_small", 8, 21.670272),
        ("vit_base", 16, 85.798656),
    ],
)
def test_parameter_counts_are_the_papers(name, patch, millions):
    with torch.device("meta"):
        model = create(name, patch_size=patch)
    assert sum(p.numel() for p in model.parameters()) == round(millions * 1e6)


def test_cls_only_last_block_is_the_full_block():
    torch.manual_seed(0)
    model = create("vit_nano", patch_size=8, image_size=32, drop_path=0.0).double()
    x = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    torch.testing.assert_close(model(x), model.tokens(x)[-1][:, 0], rtol=1e-12, atol=1e-12)
    outputs = (model(x), model.tokens(x)[-1][:, 0])
    grads = [torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in outputs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_attention_rows_sum_to_one_and_reproduce_the_output(vit_tiny):
    x = golden_images(5, 1, 3, 64, 96)
    attention = vit_tiny.attention(x)
    assert attention.shape == (1, 3, 25, 25)
    torch.testing.assert_close(vit_tiny.cls_attention(x), attention[:, :, 0, 1:])
    torch.testing.assert_close(attention.sum(-1), torch.ones(1, 3, 25))


@pytest.mark.parametrize("interp", ["offset", "size", "antialias"])
def test_positions_change_only_at_other_sizes(interp):
    model = create("vit_nano", patch_size=8, image_size=64, pos_interp=interp)
    assert model.interpolate(model.pos_embed, 8, 8, interp) is model.pos_embed
    assert model.interpolate(model.pos_embed, 4, 10, interp).shape == (1, 1 + 4 * 10, 96)


@pytest.mark.parametrize("masked", [False, True])  # as on GPUs and where the networks are compiled
def test_drop_path_keeps_the_mean_and_drops_whole_samples(monkeypatch, masked):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: masked)
    torch.manual_seed(0)
    drop, x = DropPath(0.25), torch.full((20000, 2, 3), 5.0)
    y = drop(x, lambda x: x / 5, x) - x
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(y.amax(dim=(1, 2)), y.amin(dim=(1, 2)))
    assert abs(y.mean().item() - 1) < 0.02
    assert torch.equal(drop.eval()(x, lambda x: x / 5, x), x + 1)


@pytest.mark.parametrize("rate", [0.3, 0.999])  # the second drops every sample
def test_dropped_samples_are_not_computed_but_give_the_same_gradients(monkeypatch, rate):
    model = create("vit_nano", patch_size=8, image_size=32, depth=3, drop_path=rate).double()
    images, found, computed = torch.randn(4, 3, 32, 32).double(), [], []
    model.blocks[2].mlp.register_forward_hook(lambda _, inputs, __: computed.append(len(inputs[0])))
    for masked in (True, False):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda masked=masked: masked)
        torch.manual_seed(2)
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        found.append([output, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert computed[0] == 4 > computed[1] == (0 if rate == 0.999 else computed[1])


def test_a_dropped_branch_keeps_the_precision_of_the_residual():
    model = create("vit_nano", patch_size=8, image_size=32, drop_path=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 3, 32, 32)).dtype == torch.float32


def test_a_stem_of_convolutions_keeps_the_interface():
    """[CLS] attention and tokens at every size, as for patches; only overlapping ones it does not have."""
    model = create("vit_nano_hybrid", patch_size=8, image_size=32).eval()
    images = torch.randn(2, 3, 48, 32)
    assert model.grid(48, 32) == (6, 4)
    attention = model.attention(images)
    assert attention.shape == (2, 4, 25, 25)
    torch.testing.assert_close(model.cls_attention(images), attention[:, :, 0, 1:])
    torch.testing.assert_close(model.tokens(images)[-1][:, 0], model(images))
    with pytest.raises(ValueError, match="no patches to overlap"):
        model.overlap_patches(4)
    with pytest.raises(ValueError, match="patch_size is 12; a stem of convolutions needs"):
        create("vit_nano_hybrid", patch_size=12, image_size=48)


def test_init_statistics():
    torch.manual_seed(0)
    model, head = create("vit_tiny"), Head(192, 4096)
    assert abs(model.blocks[0].mlp.fc1.weight.std().item() - 0.02) < 1e-3
    assert model.blocks[0].attn.qkv.bias.abs().max() == 0
    assert abs(model.patch_embed.proj.weight.std().item() - (1 / 768) ** 0.5 / 3**0.5) < 2e-3
    assert abs(head.last_layer.weight_v.std().item() - (1 / 256) ** 0.5 / 3**0.5) < 1e-3
    assert torch.equal(head.last_layer.weight_g, torch.ones(4096, 1))


def test_scores_are_cosines():
    head = Head(16, 50)
    assert head(torch.randn(7, 16)).abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("count", [3, 12])  # fewer images than the width: scores are scaled; else weights
def test_prototypes_scale_whichever_is_smaller(count):
    layer, x = Prototypes(8, 20, fixed_gain=False).double(), torch.randn(count, 8).double()
    layer.weight_g.data.uniform_(0.5, 2)
    assert torch.autograd.gradcheck(
        lambda v, g: functional_call(layer, {"weight_v": v, "weight_g": g}, x), (layer.weight_v, layer.weight_g)
    )
    expected = x @ (layer.weight_g * F.normalize(layer.weight_v, dim=1)).T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: create("vit_smal"), "Did you mean 'vit_small'"),
        (lambda: create("vit_tiny", patch_size=16, image_size=100), "not a multiple"),
        (lambda: create("vit_tiny")(torch.zeros(1, 3, 8, 8)), "smaller than one patch of 16"),
        (lambda: create("vit_tiny")(torch.zeros(1, 3, 32, 40)), "use 32x32"),
        (lambda: create("vit_tiny", num_heads=5), "not a multiple of num_heads"),
        (lambda: create("vit_tiny").tokens(torch.zeros(1, 3, 32, 32), layers=13), "1 to 12"),
        (lambda: Head(4, 8, num_layers=0), "needs a layer"),
    ],
)
def test_errors_say_value_rule_and_fix(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("only_cls", [False, True])
def test_attention_of_few_tokens_on_a_cpu_is_that_of_the_kernel(monkeypatch, only_cls):
    torch.manual_seed(0)
    layer = Attention(48, 6).double()
    x = torch.randn(5, 37, 48, dtype=torch.float64, requires_grad=True)
    found = []
    for few in (vit.FEW, 0):
        monkeypatch.setattr(vit, "FEW", few)
        with profile() as seen:
            out = layer(x, only_cls)
        kernels = {event.key for event in seen.key_averages()}
        assert ("aten::scaled_dot_product_attention" in kernels) == (few == 0)
        found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for fast, usual in zip(*found, strict=True):
        torch.testing.assert_close(fast, usual, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["nothing", "elementwise", "blocks"])
def test_a_training_on_a_cpu_takes_plain_products(precision, recompute):
    model = create("vit_nano", patch_size=8, image_size=32)
    model.set_recompute(recompute)
    with profile() as seen, parallel.autocast(torch.device("cpu"), precision):
        model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert "aten::scaled_dot_product_attention" not in {event.key for event in seen.key_averages()}
