"""`dino export --push`: exports on the hub are loaded by name in their library, and what goes wrong is one sentence."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
import yaml

import dino
from dino import cli
from dino.exports import card
from dino.weights import fingerprint
from helpers import TINY, draw_images, run_dino
from hub import Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client itself


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    changes = TINY | {"epochs": 1, "log.knn_every": 0}
    return dino.train(data=str(draw_images(folder / "photos")), out=str(folder / "run"), **changes)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "served") as hub:
        hub.use_here(monkeypatch, tmp_path / "home", "hf_owner")
        yield hub


def read_card(hub, repo):
    _, front, text = (hub.root / repo / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "timm"])
def test_a_pushed_run_is_loaded_by_its_name(run, hub, to, tmp_path):
    if to == "hf":
        assert cli.main(["export", str(run), "--to", to, "--push", "org/net"]) == 0
    else:
        environment = os.environ | hub.environment(tmp_path / "home", "hf_owner")
        done = run_dino("export", run, "--to", to, "--push", "org/net", env=environment, real=True)
        assert done.returncode == 0, done.stderr
        assert f"Pushed to {hub.endpoint}/org/net\n" in done.stdout
    images = torch.randn(2, 3, 32, 32)
    if to == "hf":
        import transformers

        theirs = transformers.AutoModel.from_pretrained("org/net", add_pooling_layer=False).eval()
        assert transformers.AutoImageProcessor.from_pretrained("org/net").crop_size["height"] == 32
        found = theirs(images).last_hidden_state[:, 0]
    else:
        found = timm.create_model("hf-hub:org/net", pretrained=True).eval()(images)
    torch.testing.assert_close(found, dino.load(run)(images), rtol=0, atol=1e-5)
    again = dino.load("hf:org/net")
    assert torch.equal(again(images), dino.load(run)(images))
    assert (again.preprocessing.choose_edge(32), again.view_size) == (32, 32)
    front, text = read_card(hub, "org/net")
    library = {"hf": "transformers", "timm": "timm"}[to]
    expected = {
        "library_name": library,
        "tags": ["dino", "self-supervised"],
        "pipeline_tag": "image-feature-extraction",
    }
    assert front == expected
    assert {"hf": 'from_pretrained("org/net"', "timm": '"hf-hub:org/net"'}[to] in text
    assert "teacher_temp = 0.04" in text
    assert str(run.parent) not in text  # nothing of this machine


def test_a_file_is_pushed_with_its_card_and_kept(run, hub, tmp_path):
    out = tmp_path / "mine.safetensors"
    differences = dino.export(run, "safetensors", out, push="org/net", private=True)
    assert differences[0].largest < 1e-5
    assert "org/net" in hub.private
    served = hub.root / "org/net"
    assert sorted(path.name for path in served.iterdir()) == ["README.md", "model.safetensors"]
    assert (served / "model.safetensors").read_bytes() == out.read_bytes()
    assert 'dino.load("hf:org/net")' in read_card(hub, "org/net")[1]
    assert 'dino.load("mine.safetensors")' in out.with_name("mine.safetensors.md").read_text()
    assert fingerprint(dino.load("hf:org/net")) == fingerprint(dino.load(run))
    dino.export(run, "reference", push="org/net")  # again: a commit in the same repository, nothing is deleted
    assert sorted(path.name for path in served.iterdir()) == ["README.md", "model.pth", "model.safetensors"]


def test_the_card_of_a_graph_downloads_it_by_name():
    text = card.render_card(
        "vits16", "onnx", Path("model.onnx"), {}, "0", dino.create("vit_nano"), None, repo="org/graph"
    )
    assert 'InferenceSession(hf_hub_download("org/graph", "model.onnx"))' in text
    assert "from huggingface_hub import hf_hub_download\nimport onnxruntime\n" in text


@pytest.mark.parametrize(
    ("token", "flags", "variables", "code", "words"),
    [
        (None, [], {}, 2, "needs a token of your account; make one that may write at http"),
        (None, [], {}, 2, "run `hf auth login` or set HF_TOKEN"),
        ("hf_wrong", [], {}, 1, "your token is not valid; make one"),
        ("hf_reader", [], {}, 1, "your token may not write to org; make one"),
        ("hf_owner", ["--private"], {}, 2, "is a public repository already"),
        ("hf_owner", ["--offline"], {}, 2, "leave out --offline"),
        ("hf_owner", [], {"DINO_OFFLINE": "1"}, 2, "unset DINO_OFFLINE"),
        ("hf_owner", [], {"HF_HUB_OFFLINE": "1"}, 2, "unset DINO_OFFLINE and HF_HUB_OFFLINE"),
        ("hf_owner", ["--push", "net"], {}, 2, "write ORG/NAME"),
        ("hf_owner", ["--push", "org/-net"], {}, 2, "'org/-net'"),
        ("hf_owner", [], {"broken": "503"}, 1, "it answered 503"),
        ("hf_owner", [], {"full": "1"}, 1, "it answered 507"),
        ("hf_owner", [], {"closed": "1"}, 1, "check the network and try again"),
    ],
)
def test_what_cannot_be_pushed_is_one_sentence(
    saved_model, hub, tmp_path, monkeypatch, capsys, token, flags, variables, code, words
):
    (hub.root / "org/net").mkdir(parents=True)
    hub.use_here(monkeypatch, tmp_path / "home", token)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
        if name == "HF_HUB_OFFLINE":
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.broken = int(variables.get("broken", 0)) or None
    hub.full = "full" in variables
    if "closed" in variables:
        hub.server_close()
    out = tmp_path / "a.safetensors"
    command = ["export", str(saved_model), "--to", "safetensors", "--out", str(out), "--push", "org/net", *flags]
    assert cli.main(command) == code
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("dino: ")
    assert said.count("\n") == 1
    assert not list((hub.root / "org/net").iterdir())
    # Only what the hub alone can know is said after the work, which is then kept.
    assert out.exists() == (token == "hf_reader" or "--private" in flags or hub.full)


@pytest.mark.parametrize("flags", [[], ["--private", "--out", "a.safetensors"]])
def test_an_export_goes_somewhere(saved_model, flags, capsys):
    assert cli.main(["export", str(saved_model), "--to", "safetensors", *flags]) == 2
    assert "with --out PATH or --push ORG/NAME or both; --private is of --push." in capsys.readouterr().err
