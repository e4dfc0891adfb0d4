"""What several tests share: golden weights and inputs, small folders of images, tiny runs, and the real command line."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import processes

GOLDEN = Path(__file__).parent / "golden"


def golden_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    z = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(int(np.prod(shape)))
    z = z.astype(np.float32).reshape(shape)
    if name.endswith("weight_g"):
        return np.ones(shape, np.float32)
    if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
        return 1 + 0.1 * z
    return 0.06 * z if name.endswith("qkv.weight") else 0.02 * z


def golden_images(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def load_golden_weights(module: torch.nn.Module, prefix: str = "") -> None:
    state = {k: torch.from_numpy(golden_weight(prefix + k, tuple(v.shape))) for k, v in module.state_dict().items()}
    module.load_state_dict(state)


def draw_images_and_a_broken_one(folder: Path, count: int) -> Path:
    """`count` files, of which one is no image."""
    draw_images(folder, count - 1)
    (folder / "class1" / "broken.jpg").write_bytes(b"no image")
    return folder


def draw_images(folder: Path, count: int = 24, classes: int = 3, seed: int = 0) -> Path:
    """A small labeled folder of JPEGs: colored shapes on noise, a class to a color."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        height, width = (int(x) for x in rng.integers(40, 70, 2))
        pixels = rng.integers(0, 80, (height, width, 3))
        top, left = (int(x) for x in rng.integers(0, 20, 2))
        pixels[top : top + 20, left : left + 20, i % classes] += 150
        path = folder / f"class{i % classes}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def pack_images(folder: Path, out: Path, shards: int = 3, **labels: str) -> Path:
    """The images of a folder as tar files, in the order of their paths; `labels`: an ending, and how the class is written."""
    files = sorted(folder.glob("*/*"))
    out.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.array(files, object), shards)):
        with tarfile.open(out / f"{number:04d}.tar", "w") as tar:
            for file in part:
                name = file.relative_to(folder).as_posix()
                add_member(tar, name, file.read_bytes())
                for ending, form in labels.items():
                    text = form.replace("CLASS", file.parent.name)
                    add_member(tar, f"{os.path.splitext(name)[0]}.{ending}", text.encode())
    return out


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def save_small_timm(folder: Path, mean: float | None = None, **sizes: int) -> Path:
    """A small ViT with registers as timm saves it, whose pictures have another mean if one is given."""
    import timm
    import torch

    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch14_reg4_dinov2", **sizes)
    if mean is not None:
        net.pretrained_cfg |= {"mean": (mean,) * 3, "std": (0.5, 0.5, 0.5)}
    timm.models.save_for_hf(net, folder, model_args=sizes)
    return folder


TINY = {
    "epochs": 3,
    "batch_size": 4,
    "device": "cpu",
    "threads": 1,
    "report": False,
    "data.num_workers": 0,
    "model.arch": "vit_nano",
    "model.width": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.patch_size": 8,
    "head.out_dim": 64,
    "head.hidden_dim": 32,
    "head.bottleneck_dim": 16,
    "views.global_size": 32,
    "views.local_size": 16,
    "views.num_local": 2,
    "views.global_scale": (0.4, 1.0),
    "views.local_scale": (0.05, 0.4),
    "method.momentum": 0.99,
    "method.teacher_temp_start": 0.04,
    "method.teacher_temp": 0.04,
    "optim.lr": 5e-4,
    "log.every": 2,
    "log.knn_every": 1,
    "log.to": (),
    # The paper's method, which is not what is chosen for so few images.
    "precision": "fp32",
    "model.drop_path": 0.1,
    "model.stem": "default",
    "head.num_layers": 3,
    "head.batch_norm": False,
    "head.prototypes": True,
    "method.loss": "cross-entropy",
    "method.targets": "centering",
    "method.student_temp": 0.1,
    "method.queue_size": 65536,
    "views.blur_prob": (1.0, 0.1, 0.5),
    "optim.name": "adamw",
}


def tiny_flags(**changes: object) -> list[str]:
    """A run of seconds as command-line flags; `a__b` stands for the dotted name a.b."""
    return as_flags(TINY | {k.replace("__", "."): v for k, v in changes.items()})


def as_flags(options: dict[str, object]) -> list[str]:
    """Options by their dotted names as command-line flags."""
    flags = []
    for name, value in options.items():
        section, _, leaf = name.replace("_", "-").rpartition(".")
        prefix = f"--{section}." if section else "--"
        if isinstance(value, bool) and name not in ("head.batch_norm", "head.prototypes"):  # whose default is None
            flags.append(f"{prefix}{'' if value else 'no-'}{leaf}")
        else:
            flags += [f"{prefix}{leaf}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return flags


def dino_command(*arguments: object) -> list[str]:
    """The real command line, to be started by `processes.start` or as a process without any help."""
    return [sys.executable, "-m", "dino", *map(str, arguments)]


def run_dino(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The real command line in a process of its own, on `ranks` of them; `real` is without the help of a fork server."""
    return processes.run(dino_command(*arguments), **options)


def ranks_agree(*arguments: object) -> dict[str, Any]:
    """The --json of a command, on which one rank, two ranks, and one again that finds all features kept agree."""
    results, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        for ranks, cache in ((1, "one"), (2, "two"), (1, "one")):
            file, environment = Path(folder, "result.json"), os.environ | {"DINO_CACHE": str(Path(folder, cache))}
            done = run_dino(*arguments, "--json", file, ranks=ranks, env=environment)
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("Written") == 1
            results.append(json.loads(file.read_text()))
            written.append({p.name: p.stat().st_mtime_ns for p in Path(folder, cache).rglob("*.safetensors")})
    assert results[0] == results[1] == results[2]
    assert written[0].keys() == written[1].keys()
    assert written[0] == written[2]
    return results[0]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """All weights, the center and the optimizer of a run's last checkpoint, by name."""
    from dino.weights.checkpoints import read_newest

    found = read_newest(run / "checkpoints")
    assert found is not None
    state = found.state
    flat = dict(state["method"])
    for index, values in state["optimizer"]["state"].items():
        flat |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in values.items()}
    return flat | {"step": torch.tensor(state["step"])}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def read_example(name: str) -> str:
    """The file of this name that docs/clusters.md shows."""
    page = (Path(__file__).parent.parent / "docs" / "clusters.md").read_text(encoding="utf-8")
    return re.search(rf'^```\w+ title="{name}"\n(.*?)^```', page, re.MULTILINE | re.DOTALL)[1]
