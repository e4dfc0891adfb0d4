"""README.md and docs/: every command and Python block runs. A page is a session: its blocks run in order, in one working
directory that has small drawn data and a tiny trained run under the names that the pages use."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pandas
import pytest
import tomli_w
import torch
import yaml
from moto import mock_aws
from PIL import Image
from torch.distributed.run import get_args_parser

import dino
from dino import cli, run
from dino.options import auto, replace, toml
from dino.options.train import TrainOptions
from drawing import draw_square, draw_video, encode_clip, lay_out_landmarks
from helpers import TINY, as_flags, draw_images, pack_images, read_example, run_dino

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(console|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUNS = ("a", "demo", "photos", "caltech")  # run directories that pages evaluate and look at

# What makes training quick; a page's own options win. Of other commands, flags that are added at the end.
LEAST = TINY | {"model.depth": 4, "epochs": 30, "stop_after": 2, "overwrite": True}
QUICK = {
    "eval linear": ["--epochs", "1", "--batch-size", "16"],
    "eval finetune": ["--epochs", "1", "--batch-size", "16"],
    "select": ["--threshold", "0.9999"],  # a model so little trained cannot tell images apart, and the command says so
}
# Only parsed by the real parser of options, because:
PARSED = {
    r"models \S": "it downloads",
    r"export .*--push": "it uploads: test_push.py runs it",
    r"train .*--init vits16:full": "it downloads",
    r".*(timm:\S+\.\S|hf:\S)": "it downloads: test_families.py loads by name, test_start.py and test_distillation.py train",
    r"app": "it serves until it is interrupted: test_app.py opens it in a browser",
    r"train .*--minutes": "it first measures the speed: test_budget.py runs it",
    r"train .*hf://": "it downloads: test_tables.py does so",
    r"train .*s3://": "it reads from an object store: test_storage.py starts one",
    r"train .*--log.to": "it sends figures elsewhere: test_trackers.py does so",
    r"submit": "it sends a job: test_slurm.py does so",
    r"(bench|plan)": "they measure for a while: test_bench.py and test_plan.py run them",
    r"ablate": "six to nine trainings, each a process: test_ablate.py runs them",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("workspace")
    labeled = draw_images(root / "labeled/train", 210)
    for name in (
        "labeled/val",
        "labeled/test",
        "photos",
        "train",
        "imagenet/train",
        "imagenet_sample",
        "icons",
        "xrays",
    ):
        draw_images(root / name)
    for name in ("caltech20", "cifar5k", "cifar10"):
        for part in ("train", "val", "test", "images"):
            shutil.copytree(labeled, root / name / part)
    (root / "caltech20/images/Leopards").mkdir()
    shutil.copy(root / "photos/class0/000.jpg", root / "caltech20/images/Leopards/image_0003.jpg")
    shutil.copy(root / "photos/class0/000.jpg", root / "photo.jpg")
    for i in range(4):
        draw_square(root / f"photos/{i}.png", seed=i)
    for name in ("img.jpg", "a.jpg", "b.jpg"):
        shutil.copy(root / "photos/class0/000.jpg", root / name)
    lay_out_landmarks(root / "rcaltech")
    draw_video(root / "davis_dev", "walk")
    for name in ("originals", "copies", "distractors"):
        shutil.copytree(root / "photos/class0", root / name)
    for images, masks in (("ecssd/images", "ecssd/masks"), ("i", "m")):
        (root / masks).mkdir(parents=True)
        for i in range(6):
            draw_square(root / images / f"{i}.png", seed=i)
            Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), ((8, 16), (16, 24)))).save(
                root / masks / f"{i}.png"
            )
    pack_images(labeled, root / "shards")
    (root / "tables").mkdir()
    images = sorted(labeled.glob("*/*"))
    pandas.DataFrame({"image": [path.read_bytes() for path in images]}).to_parquet(root / "tables/0.parquet")
    encode_clip(root / "walk.mp4", [0, 0.1, 0.2])
    (root / "mine.toml").write_text(tomli_w.dumps(toml.to_dict(replace(TrainOptions(), TINY))))
    run = dino.train(data=str(root / "photos"), out=str(root / "runs/a"), **TINY | {"epochs": 1, "model.depth": 4})
    for name in RUNS[1:]:
        shutil.copytree(run, root / "runs" / name)
    return root


@pytest.fixture
def session(workspace, tmp_path, monkeypatch) -> Path:
    """A copy of the working directory, in which `dino.train` is quick."""
    shutil.copytree(workspace, tmp_path / "session")
    monkeypatch.chdir(tmp_path / "session")
    train = run.train

    def quick(recipe=None, data=None, out=None, **changes):
        data = "scenes:64" if recipe == "demo" else data
        return train(recipe, data, out, **LEAST | changes | {"stop_after": 2, "epochs": 30})

    monkeypatch.setattr(run, "train", quick)
    return tmp_path / "session"


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


def quickened(command: str, arguments: list[str]) -> list[str]:
    """The page's arguments of a command, with those that make it quick."""
    if command != "train":
        return [*arguments, *QUICK.get(command, [])]
    if "--resume" in arguments and "auto" not in arguments:
        return [*arguments, "--stop-after", "4"]
    recipe = arguments[: not arguments[0].startswith("-")]
    options = LEAST | ({"data.path": "scenes:64"} if recipe == ["demo"] else {})
    if any(re.search("timm:|^resnet", a) for a in arguments):  # widths are the architecture's, and views not so small
        options = {k: v for k, v in LEAST.items() if not k.startswith("model.")}
        options |= {"views.global_size": 64, "views.local_size": 32}
    return [*recipe, *as_flags(options), *arguments[len(recipe) :]]


def parsed(arguments: list[str]) -> tuple[str, list[str]]:
    """The command and its arguments, which the command line's own parser has accepted."""
    if arguments[0] == "help":
        assert any(f"{name} ".startswith(" ".join([*arguments[1:], ""])) for name in cli.COMMANDS)
        return "help", arguments[1:]
    command, _ = cli.parse(arguments)
    return command, arguments[len(command.split()) :]


def execute(words: list[str]) -> None:
    ranks = 2 if "torchrun" in words else 1
    command, arguments = parsed(words[words.index("dino") + 1 :])
    if any(re.match(known, " ".join([command, *arguments])) for known in PARSED):
        return
    if command == "help":
        return
    arguments = [*command.split(), *quickened(command, arguments)]
    if ranks > 1 or {"onnx", "torch-export"} & {*arguments}:  # graphs cannot be made where tests check types
        done = run_dino(*arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
    else:
        assert cli.main(arguments) in ((0, 1) if command == "doctor" else (0,))  # 1: what it examines is ill


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_examples_of_help_run(command, session):
    """They name what the pages name, and an embedding of these images."""
    if "x.parquet" in (examples := cli.COMMANDS[command].options.__doc__ or ""):
        assert cli.main(["embed", "runs/a", "photos/", "--out", "x.parquet"]) == 0
    for line in re.findall(r"^ *(dino .*)$", examples, re.MULTILINE):
        execute(shlex.split(line))


# test_fine_tuning.py runs that page on real images.
@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "fine-tuning"], ids=lambda page: page.name)
def test_page_runs(page, session):
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            known = {"__name__": "__main__", "dino": dino, "images": torch.rand(2, 3, 32, 32)}
            exec(compile(block, str(page), "exec"), known)
            continue
        for words in commands(block):
            print("$", shlex.join(words))
            if words[0] in ("make", "pip"):  # they install from the network, and tests in tests
                assert words[0] == "pip" or f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
            else:
                execute(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_parse(page):
    """`dino ...` in running text; capitals stand for something, '...' for more, and a bare command for itself."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for span in re.findall(r"`dino ([a-z][^`]* [^`]*)`", text):
        if "..." not in span and " ".join(span.split()) not in cli.COMMANDS and not re.search(r"\b[A-Z]{3,}", span):
            parsed(shlex.split(span))


def check_torchrun(words: list[str]) -> None:
    """torchrun and `dino train` take all of their options."""
    given = get_args_parser().parse_args(words[1:])
    assert (words[0], given.module, given.training_script) == ("torchrun", True, "dino")
    command, options = cli.parse(given.training_script_args)
    assert (command, options.resume) == ("train", "auto")
    assert options.out


def test_files_for_clusters_start_torchrun(monkeypatch):
    job = yaml.safe_load(read_example("pytorchjob.yaml"))
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    check_torchrun([*container["command"], *container["args"]])

    task = yaml.safe_load(read_example("dino.yaml"))
    told = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    told |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    script = 'torchrun() { printf "%s\n" torchrun "$@"; }\n' + task["run"]
    done = subprocess.run(["bash", "-c", script], env=os.environ | told, capture_output=True, text=True, check=True)
    check_torchrun(done.stdout.splitlines())
    assert "10.0.0.1" in done.stdout.splitlines()

    for name, value in (("DEFAULT_REGION", "us-east-1"), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with mock_aws():
        exec(read_example("sagemaker_job.py"), {})
        client = boto3.client("sagemaker")
        (job,) = client.list_training_jobs()["TrainingJobSummaries"]
        what = client.describe_training_job(TrainingJobName=job["TrainingJobName"])["AlgorithmSpecification"]
    check_torchrun([*what["ContainerEntrypoint"], *what["ContainerArguments"]])


def test_table_of_choices_is_what_is_chosen():
    text = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| ([CG]PU) \| " + r" \| ".join([r"(\S+)"] * 5) + r" \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for images, device, *wanted in rows:
        o = auto.resolve(TrainOptions(), int(images.replace(",", "")), 300, device == "GPU", 4)
        found = (o.model.arch, o.method.loss, o.views.global_size, o.batch_size, o.method.momentum)
        assert [str(value) for value in found] == wanted


def run_notebook(path: Path) -> dict[str, Any]:
    """Run the code cells as a notebook does, showing what each ends with, and return the names that they leave."""
    notebook, names = json.loads(path.read_text(encoding="utf-8")), dict[str, Any]()
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert (cell["outputs"], cell["execution_count"]) == ([], None), "clear the outputs"
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), names)
        if isinstance(last, ast.Expr):
            shown = names["_"] = eval(compile(ast.Expression(last.value), path.name, "eval"), names)
            assert repr(shown)
            for form in ("_repr_html_", "_repr_png_"):
                assert getattr(shown, form, lambda: "none")()
    return names


@pytest.mark.slow
def test_notebooks_run_and_learn(tmp_path, monkeypatch):
    """They share a folder, and so its run, which the first of them trains."""
    monkeypatch.chdir(tmp_path)
    left = {path.stem: run_notebook(path) for path in sorted((ROOT / "examples").glob("*.ipynb"))}
    assert set(left) == {"detector", "few_labels", "fine_tuning", "search", "tour"}
    accuracy = left["tour"]["accuracy"]
    assert accuracy["trained"] > accuracy["untrained"] + 5
    labeled, untrained = (left["few_labels"][name].figures for name in ("labeled", "untrained"))
    assert sum(labeled.values()) > sum(untrained.values())
    assert left["fine_tuning"]["accuracy"] > 0.3
    losses = left["detector"]["losses"]
    assert losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "runs/tour.safetensors").is_file()


def test_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {p.stem for p in PAGES} - {"README"} <= {p.stem for p in tmp_path.glob("*.html")}
    loads = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//[^>]*|<link(?![^>]*rel=["']?canonical)[^>]*href=["']?(?:https?:)?//[^>]*"""
    )
    for page in tmp_path.rglob("*.html"):
        assert not loads.findall(page.read_text(encoding="utf-8"))
    for style in tmp_path.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", style.read_text(encoding="utf-8"))
