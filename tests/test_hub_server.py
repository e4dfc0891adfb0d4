"""The loopback hub, as the clients of huggingface.co see it."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download

from hub import Hub, hash_commit

LARGE = bytes(range(256)) * 100


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "served") as hub:
        for revision, text in (("", "new"), ("@v1", "old")):
            folder = hub.root / "org" / f"net{revision}"
            (folder / "more").mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({"is": text}))
            (folder / "more/model.safetensors").write_bytes(LARGE)
        hub.use_here(monkeypatch, tmp_path / "home")
        yield hub


def test_files_of_every_revision_are_downloaded_once(hub):
    commit = hash_commit(hub.root / "org/net")
    for revision, text in (("main", "new"), ("v1", "old"), (commit, "new")):
        path = hf_hub_download("org/net", "config.json", revision=revision)
        assert json.loads(Path(path).read_text()) == {"is": text}
    assert HfApi().model_info("org/net").sha == commit
    assert sum(line.startswith("GET /org/net/resolve") for line in hub.requests) == 2  # main is that commit
    folder = snapshot_download("org/net", allow_patterns="*.safetensors")
    assert Path(folder, "more/model.safetensors").read_bytes() == LARGE


def test_a_cut_download_goes_on_where_it_broke_off(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what a download keeps when it breaks off
    hub.cuts = [1000]
    path = hf_hub_download("org/net", "more/model.safetensors")
    assert Path(path).read_bytes() == LARGE
    assert [line.split(" ")[2:] for line in hub.requests if line.startswith("GET")] == [[], ["bytes=1000-"]]


@pytest.mark.parametrize(
    ("token", "repo", "revision", "file", "error", "says"),
    [
        (None, "org/none", "main", "config.json", errors.RepositoryNotFoundError, "401"),
        ("hf_reader", "org/none", "main", "config.json", errors.RepositoryNotFoundError, "404"),
        (None, "org/net", "v2", "config.json", errors.RevisionNotFoundError, "v2"),
        (None, "org/net", "main", "none.json", errors.RemoteEntryNotFoundError, "none.json"),
        (None, "org/gated", "main", "config.json", errors.GatedRepoError, "401"),
        ("hf_reader", "org/gated", "main", "config.json", errors.GatedRepoError, "403"),
        ("hf_wrong", "org/net", "main", "config.json", errors.HfHubHTTPError, "Invalid credentials"),
    ],
)
def test_refusals_are_those_of_the_hub(hub, token, repo, revision, file, error, says):
    (hub.root / "org/net@v1").rename(hub.root / "org/gated")
    hub.gated["org/gated"] = {"hf_owner"}
    with pytest.raises(error, match=says):
        hf_hub_download(repo, file, revision=revision, token=token)
    assert hf_hub_download("org/gated", "config.json", token="hf_owner")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client itself
def test_a_folder_is_pushed_by_those_who_may(hub, tmp_path):
    sent = tmp_path / "sent"
    sent.mkdir()
    (sent / "README.md").write_text("---\nlibrary_name: timm\n---\n# Mine\n")
    torch.save(torch.arange(3), sent / "weights.pth")
    api = HfApi(token="hf_owner")
    assert str(api.create_repo("org/mine", private=True, exist_ok=True)) == f"{hub.endpoint}/org/mine"
    pushed = api.upload_folder(repo_id="org/mine", folder_path=sent)
    assert pushed.oid == hash_commit(hub.root / "org/mine")
    assert (hub.root / "org/mine/weights.pth").read_bytes() == (sent / "weights.pth").read_bytes()
    assert api.create_repo("org/mine", exist_ok=True)
    api.upload_folder(repo_id="org/mine", folder_path=sent)  # nothing is new
    assert len([line for line in hub.requests if line.startswith("PUT")]) == 1
    assert [f.path for f in api.list_repo_tree("org/mine", recursive=True)] == ["README.md", "weights.pth"]
    with pytest.raises(errors.RepositoryNotFoundError):
        huggingface_hub.model_info("org/mine", token=False)
    for token, status in (("hf_reader", 403), ("hf_wrong", 401), (False, 401)):
        with pytest.raises(errors.HfHubHTTPError, match=str(status)):
            HfApi(token=token).create_repo("org/other")


@pytest.mark.slow
def test_timm_and_transformers_load_by_name(hub):
    transformers = pytest.importorskip("transformers")
    ours = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_classes=0)
    sizes = {"img_size": 32, "embed_dim": 24, "depth": 1}
    timm.models.save_for_hf(ours, hub.root / "org/timm-net", model_args=sizes, safe_serialization=True)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=48, image_size=32
    )
    theirs = transformers.ViTModel(config).eval()
    theirs.save_pretrained(hub.root / "org/hf-net")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        loaded = timm.create_model("hf-hub:org/timm-net", pretrained=True).eval()
        assert torch.equal(loaded(images), ours.eval()(images))
        loaded = transformers.AutoModel.from_pretrained("org/hf-net").eval()
        assert torch.equal(loaded(images).last_hidden_state, theirs(images).last_hidden_state)
