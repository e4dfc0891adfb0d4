"""The explorer: its pictures as arrays, and the page itself in a real browser, through the real command."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dino
from dino import weights
from dino.cli import main
from helpers import TINY, dino_command, draw_images

gradio = pytest.importorskip("gradio")
from dino.app.explorer import (  # noqa: E402
    Explorer,
    draw_alike,
    find_newest_run,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Images of three colors, one of which is there twice."""
    folder = draw_images(tmp_path_factory.mktemp("album"), 40)
    shutil.copy(folder / "class1" / "001.jpg", folder / "class1" / "copy.jpg")
    return folder


@pytest.fixture(scope="module")
def trained(album, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "mine"
    return dino.train(data=str(album), out=str(out), **TINY | {"log.keep": 9, "log.knn_every": 0})


@pytest.fixture(scope="module")
def explorer(trained, album) -> Explorer:
    return Explorer(weights.load(trained), trained, str(album), None)


def test_pictures_of_an_image(explorer, album):
    shown = explorer.open_image(str(album / "class0" / "000.jpg"), 64)
    assert min(shown.pixels.shape[:2]) == 64
    heads = shown.draw_heads()
    assert [name for _, name in heads] == ["the image", "mean of all heads", "head 0", "head 1"]
    assert all(picture.shape == shown.pixels.shape for picture, _ in heads)
    assert shown.enlarge(shown.colors).shape == shown.enlarge().shape
    kept = [[np.mean((mask == shown.pixels).all(-1)) for mask, _ in shown.draw_masks(m)] for m in (0.1, 0.5, 0.95)]
    assert (np.diff(kept, axis=0) > 0).all()  # the more attention, the more of the image


def test_a_patch_is_most_like_itself(explorer, album):
    shown, other = (explorer.open_image(str(album / f"class{i}" / f"00{i}.jpg"), 64) for i in (0, 1))
    (height, width), patch, cells = shown.pixels.shape[:2], 8, shown.features.flatten(0, 1)
    for x, y in ((0, 0), (width - 1, height - 1), (20, 35)):
        cell = y // patch * (width // patch) + x // patch
        assert int((cells @ cells[cell]).argmax()) == cell
        zoom = shown.zoom
        assert zoom * 64 >= 360
        first, second = draw_alike(shown, other, (x * zoom, y * zoom))
        assert first.shape == shown.enlarge().shape
        assert second is not None
        assert second.shape == other.enlarge().shape
        left, top = x // patch * patch * zoom, y // patch * patch * zoom
        assert (first[top, left] == 255).all()  # its frame
    assert draw_alike(shown, None, (0, 0))[1] is None


def test_neighbors_and_copies(explorer, album, tmp_path):
    with pytest.raises(ValueError, match="press the button first"):
        explorer.find_nearest(explorer.open_image(0, 32), 3)
    progress = list(explorer.index_images(tmp_path / "embeddings"))
    assert progress[-1] == (41, 41)
    found = explorer.find_nearest(explorer.open_image(str(album / "class1" / "001.jpg"), 32), 4)
    assert {caption for _, caption in found[:2]} == {"1.000  class1/001.jpg", "1.000  class1/copy.jpg"}
    said, groups = explorer.find_copies()
    assert re.match(r"\d+ of 41 images are near-copies, in groups: \d+\.", said)
    group = {caption.partition(" · ")[2]: caption.partition(" · ")[0] for _, caption in groups}
    assert group["class1/001.jpg"] == group["class1/copy.jpg"]
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "embeddings").rglob("*.parquet"))
    list(explorer.index_images(tmp_path / "embeddings"))  # found again
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "embeddings").rglob("*.parquet"))


def test_checkpoints_are_shown_in_their_order(explorer, trained):
    assert len(explorer.checkpoints) == 3
    shown = explorer.open_image(0, 32)
    picture = explorer.draw_checkpoints(shown, 32)
    assert picture.shape[1] >= 4 * shown.pixels.shape[1]
    last = weights.load(explorer.checkpoints[-1]).state_dict()
    assert all(torch.equal(value, last[name]) for name, value in weights.load(trained).state_dict().items())
    with pytest.raises(ValueError, match="start the explorer with a run directory"):
        Explorer(weights.load(trained), None, None, None).draw_checkpoints(shown, 32)


def test_a_model_without_attention(album):
    model = dino.create("timm:resnet10t", image_size=64).eval()
    explorer = Explorer(model, None, str(album), None)
    shown = explorer.open_image(0, 64)
    assert not explorer.model.has_attention
    assert shown.look is None
    assert draw_alike(shown, shown, (5, 5))[1] is not None
    assert shown.enlarge(shown.colors).shape == shown.enlarge().shape


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 broken"])
def test_what_is_no_image_is_one_sentence(explorer, content, tmp_path):
    (file := tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"^This cannot be shown: .*\.$"):
        explorer.open_image(str(file), 32)


def test_huge_images_are_refused_before_they_are_decoded(explorer, tmp_path):
    Image.new("1", (10_000, 6_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="too many pixels"):
        explorer.open_image(str(tmp_path / "huge.png"), 32)


def test_an_embedding_of_another_model_is_refused(album, trained, saved_model, tmp_path, capsys):
    out = dino.embed(str(saved_model), str(album), tmp_path / "x.parquet", device="cpu").path
    assert main(["app", str(trained), "--embedding", str(out), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "was made by another model" in said
    assert said.count("\n") == 1
    good = dino.embed(str(trained), str(album), tmp_path / "y.parquet", device="cpu").path
    explorer = Explorer(weights.load(trained), None, None, str(good))
    assert len(explorer.find_nearest(explorer.open_image(0, 32), 3)) == 3


def test_bad_ways_to_start(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no run in runs/"):
        find_newest_run()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["app", str(trained), "--device", "cpu", "--port", port]) == 2
    assert f"--port {port} is taken" in capsys.readouterr().err
    assert main(["app", str(trained), "--data", "nowhere", "--device", "cpu"]) == 2
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", str(trained)]) == 2
    assert "pip install 'dino[app]'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- in a browser


@contextmanager
def served(*arguments: object, cwd: Path) -> Iterator[str]:
    """The page's address; Ctrl-C ends it in order."""
    command = dino_command("app", *arguments, "--device", "cpu")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests that run in the background would hand down that interrupts are ignored.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(command, cwd=cwd, preexec_fn=heed, **pipes)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address, process.communicate()
        yield address[0]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in said
    finally:
        process.kill()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (or Google Chrome) in PATH")
def test_the_page_in_a_browser(trained, album, tmp_path):
    """Newest run by itself; upload, slider, click, search, near-copies, checkpoints; a broken upload; no other host."""
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "broken.jpg").write_text("no image")
    (tmp_path / "runs").symlink_to(trained.parent)
    asked = []
    with served("--data", album, cwd=tmp_path) as address, playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1300, "height": 950})
        page.set_default_timeout(60_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#masks img")  # of the first image offered

        def pictures(where: str) -> list[str]:
            return page.eval_on_selector_all(f"{where} img", "images => images.map(image => image.src)")

        def changes(where: str, before: list[str]) -> list[str]:
            page.wait_for_function(
                "([where, before]) => { const now = [...document.querySelectorAll(where + ' img')].map(i => i.src);"
                " return now.length && now.join() != before }",
                arg=[where, ",".join(before)],
            )
            return pictures(where)

        offered = pictures("#heads")
        page.set_input_files("#first-file input[type=file]", album / "class1" / "001.jpg")
        mine = changes("#heads", offered)
        assert len(mine) == 4  # the image, the mean, two heads
        masks = pictures("#masks")
        page.locator("#mass input[type=number]").fill("0.2")
        page.locator("#mass input[type=number]").press("Enter")
        changes("#masks", masks)

        page.get_by_role("tab", name="What is alike").click()
        clicked = pictures("#a")
        page.locator("#a img").click(position={"x": 30, "y": 30})
        changes("#a", clicked)
        page.get_by_text("Choose a second image").click()
        page.locator("#second-picks button").first.click()
        second = changes("#b", [])
        page.locator("#a img").click(position={"x": 60, "y": 50})
        changes("#b", second)

        page.get_by_role("tab", name="Nearest images").click()
        page.click("#index")
        page.wait_for_selector("#found img")
        captions = page.locator("#found .caption-label").all_inner_texts()
        assert {"1.000 class1/001.jpg", "1.000 class1/copy.jpg"} == {" ".join(text.split()) for text in captions[:2]}
        page.click("#look")
        page.get_by_text("of 41 images are near-copies").wait_for()
        page.wait_for_selector("#groups img")

        page.get_by_role("tab", name="Over time").click()
        page.click("#go")
        page.wait_for_selector("#over img")

        page.get_by_role("tab", name="Where it looks").click()
        page.locator("#first-file button").first.click()  # takes the file away
        before = pictures("#heads")
        page.set_input_files("#first-file input[type=file]", tmp_path / "broken.jpg")
        page.get_by_text("This cannot be shown: not an image (JPEG, PNG, WebP, BMP, TIFF or GIF).").wait_for()
        assert pictures("#heads") == before  # nothing is lost
        browser.close()
    assert asked
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)


def test_the_page_answers_this_machine_alone(trained, tmp_path):
    with served(trained, cwd=tmp_path) as address:
        port = int(address.rpartition(":")[2])
        others = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {
            "127.0.0.1"
        }
        for host in others:
            with pytest.raises(OSError), socket.create_connection((host, port), timeout=2):  # noqa: PT011
                pass
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
        assert os.environ.get("GRADIO_SHARE") is None
