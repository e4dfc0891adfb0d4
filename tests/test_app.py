"""The explorer: its pictures as arrays; the page itself in a real browser, through the real command; and who may use it."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dino
from dino import weights
from dino.cli import main
from dino.data.open import open_images
from helpers import TINY, dino_command, draw_images

gradio, httpx = pytest.importorskip("gradio"), pytest.importorskip("httpx")
from dino.app import guard  # noqa: E402
from dino.app.atlas import CHOSEN, OTHERS, TAGGED, Atlas, write_plainly  # noqa: E402
from dino.app.explorer import (  # noqa: E402
    MAX_PATCHES,
    Explorer,
    draw_alike,
    find_newest_run,
)
from dino.app.page import has_display, open_browser  # noqa: E402

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
    shown = explorer.open_file(album / "class0" / "000.jpg", 64)
    assert min(shown.pixels.shape[:2]) == 64
    heads = shown.draw_heads()
    photo, ranges = shown.look.photo, shown.look.ranges
    names = [f"mean of all heads: {ranges[2]}", f"head 0: {ranges[0]}", f"head 1: {ranges[1]}"]
    assert [name for _, name in heads] == ["the image", *names]
    assert all(picture.shape == photo.shape for picture, _ in heads)
    assert shown.enlarge(shown.colors).shape == shown.enlarge().shape
    kept = [[np.mean((mask == photo).all(-1)) for mask, _ in shown.draw_masks(m)] for m in (0.1, 0.5, 0.95)]
    assert (np.diff(kept, axis=0) > 0).all()  # the more attention, the more of the image


def test_a_patch_is_most_like_itself(explorer, album):
    shown, other = (explorer.open_file(album / f"class{i}" / f"00{i}.jpg", 64) for i in (0, 1))
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
        explorer.find_nearest(explorer.open_offered(0, 32), 3)
    progress = list(explorer.index_images(tmp_path / "embeddings"))
    assert progress[-1] == (41, 41)
    found = explorer.find_nearest(explorer.open_file(album / "class1" / "001.jpg", 32), 4)
    captions = [caption.split("  ") for _, caption in found]
    assert {name for _, name in captions[:2]} == {"class1/001.jpg", "class1/copy.jpg"}
    assert float(captions[0][0]) == float(captions[1][0]) == 1
    assert float(captions[2][0]) < 1  # with as many digits as tell
    atlas = explorer.atlas
    assert re.match(
        r"\d+ of 41 images are near-copies, in \d+ groups?\. Marked to be left out: \d+;", atlas.describe_copies()
    )
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "embeddings").rglob("*.parquet"))
    list(explorer.index_images(tmp_path / "embeddings"))  # found again
    assert before == sorted(p.stat().st_mtime_ns for p in (tmp_path / "embeddings").rglob("*.parquet"))


@pytest.fixture
def atlas(trained, album, tmp_path, monkeypatch) -> Atlas:
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
    embedding = dino.embed(str(trained), str(album), tmp_path / "x.parquet", device="cpu")
    return Atlas(embedding.read(), embedding.images())


def test_near_copies_are_left_out_by_a_click_and_the_rest_is_a_list(atlas, tmp_path, album):
    (slot, group) = next(
        (slot, [copy.row for copy in group])
        for slot, (_, group) in enumerate(atlas.list_groups(1))
        if "class1/copy.jpg" in [atlas.get_name(copy.row) for copy in group]
    )
    assert "class1/001.jpg" in {atlas.get_name(row) for row in group}
    out = {copy.row for group in atlas.copies.groups for copy in group[1:]}
    assert atlas.left_out == out  # the best of each is kept
    captions = [caption for _, caption in atlas.draw_group(atlas.list_groups(1)[slot][1])]
    assert captions[0].startswith(f"✓ kept: {atlas.get_name(group[0])} (")
    assert captions[1].startswith(f"✗ left out: {atlas.get_name(group[1])} (")
    atlas.toggle(1, slot, 1)
    assert atlas.left_out == out - {group[1]}
    atlas.toggle(1, slot, 0)
    atlas.write_list(tmp_path, "rest.txt", atlas.list_rest())
    written = {Path(line) for line in (tmp_path / "rest.txt").read_text().splitlines()}
    left = {album / atlas.get_name(row) for row in out - {group[1]} | {group[0]}}
    assert written == set(album.rglob("*.jpg")) - left
    for page, at in ((0, 0), (99, 0), ("1", 0), (1, 10**6), (1, -1), (1, None)):
        with pytest.raises(ValueError, match="must be a whole number"):
            atlas.toggle(page, slot, at)


def test_the_map_is_computed_once_and_its_outlines_choose_images(atlas, monkeypatch):
    drawn = json.loads(atlas.draw_map())
    assert [trace["name"] for trace in drawn["data"]] == ["class0", "class1", "class2"]
    assert sum(len(trace["x"]) for trace in drawn["data"]) == 41
    monkeypatch.setattr("dino.features.layout.lay_out", lambda _: pytest.fail("it is in the cache"))
    again = Atlas(atlas.embedding, atlas.images)
    assert np.array_equal(again.points, atlas.points)

    (x, y), far = atlas.points[7].tolist(), 1e6
    near = [x - 1e-3, y - 1e-3, x + 1e-3, y - 1e-3, x + 1e-3, y + 1e-3, x - 1e-3, y + 1e-3]
    all_of_it = [-far, -far, far, -far, far, far, -far, far]
    assert 7 in atlas.choose({"shapes": [near], "hidden": []})
    assert len(atlas.choose({"shapes": [near, all_of_it], "hidden": []})) == 41
    labels = {atlas.get_label(row) for row in atlas.choose({"shapes": [all_of_it], "hidden": [1]})}
    assert labels == {"class0", "class2"}
    assert atlas.choose({"row": 7}) == [7]
    assert atlas.choose({"shapes": [], "hidden": []}) == []


@pytest.mark.parametrize(
    "chosen",
    [
        *(None, [], "row", {}, {"row": -1}, {"row": 41}, {"row": 1.0}, {"row": True}, {"shapes": 1, "hidden": []}),
        *({"shapes": [shape], "hidden": []} for shape in ([0, 0, 1, 1], [0] * 7, ["0"] * 6, [None] * 6, [[0, 0]] * 3)),
        *({"shapes": [[0, 0, 1, 1, 0, bad]], "hidden": []} for bad in (float("nan"), float("inf"), 10**400, True)),
        {"shapes": [[0] * 30_000], "hidden": []},
        {"shapes": [[0] * 6] * 51, "hidden": []},
        *({"shapes": [], "hidden": [hidden]} for hidden in (3, -1, "0", None)),
    ],
)
def test_what_is_no_selection_is_one_sentence(atlas, chosen):
    with pytest.raises(
        ValueError, match=r"^(A selection|An outline|The row of an image|The number of a class) must be .*\.$"
    ):
        atlas.choose(chosen)


def test_lists_and_tags_are_what_other_commands_take(atlas, album, tmp_path):
    rows = [row for row in range(41) if atlas.get_label(row) != "class2"]
    atlas.tag(rows[:2], "blurry")
    atlas.tag(rows[:1], "  dark ")
    atlas.tag(rows[1:2], "blurry", remove=True)
    assert [caption for _, caption in atlas.draw_chosen(rows[:2])] == [
        f"{atlas.get_name(rows[0])} · blurry · dark",
        atlas.get_name(rows[1]),
    ]
    said = atlas.write_list(tmp_path / "lists", "mine.csv", rows)
    assert f"dino train --data {tmp_path / 'lists' / 'mine.csv'}" in said
    with open(tmp_path / "lists" / "mine.csv", newline="") as file:
        first, *others = csv.DictReader(file)
    assert first == {
        "path": str(album / atlas.get_name(rows[0])),
        "label": atlas.get_label(rows[0]),
        "tags": "blurry,dark",
    }
    assert {row["tags"] for row in others} == {""}
    atlas.write_list(tmp_path / "lists", "mine.txt", rows)
    for name, classes in (("mine.csv", ("class0", "class1")), ("mine.txt", ())):
        source = open_images(tmp_path / "lists" / name)
        assert {Path(source.find_place(i).path) for i in range(len(source))} == {
            album / atlas.get_name(row) for row in rows
        }
        assert source.classes == classes
    before = (tmp_path / "lists" / "mine.csv").read_bytes()
    with pytest.raises(ValueError, match="exists; choose another name"):
        atlas.write_list(tmp_path / "lists", "mine.csv", rows[:1])
    assert (tmp_path / "lists" / "mine.csv").read_bytes() == before
    for name in (
        "../x.csv",
        "/tmp/x.csv",
        "a/b.txt",
        "list.TXT",
        ".hidden.txt",
        "x.py",
        "",
        None,
        3,
        "x" * 200 + ".txt",
    ):
        with pytest.raises(ValueError, match=r"no folder\) that ends in \.txt or \.csv in small letters"):
            atlas.write_list(tmp_path / "lists", name, rows)
    for tag in ("", "a,b", "<b>", "a\nb", None, "x" * 60):
        with pytest.raises(ValueError, match="A tag must be"):
            atlas.tag(rows, tag)
    with pytest.raises(ValueError, match="choose others"):
        atlas.write_list(tmp_path / "lists", "none.txt", [])
    assert sorted(path.name for path in (tmp_path / "lists").iterdir()) == ["mine.csv", "mine.txt"]


def test_a_list_has_the_images_of_one_tag_or_of_the_choice(atlas):
    assert atlas.describe_tags() == "Tags: none yet"
    with pytest.raises(ValueError, match="Write a tag that images have into the box above: there is none yet"):
        atlas.list_rows(TAGGED, [], "")
    atlas.tag([3, 5], "keep")
    atlas.tag([5, 7], "blurry")
    atlas.tag([9], "keep")
    assert atlas.describe_tags() == "Tags: blurry (2), keep (3)"
    assert atlas.list_rows(TAGGED, [1], " keep ") == [3, 5, 9]
    for tag in ("", "kee", None):
        with pytest.raises(ValueError, match=r"a tag that images have into the box above: blurry, keep\.$"):
            atlas.list_rows(TAGGED, [1], tag)
    assert atlas.list_rows(CHOSEN, [1], "keep") == [1]
    assert atlas.list_rows(OTHERS, [1], "keep") == [0, *range(2, 41)]
    for which in (CHOSEN, OTHERS):
        with pytest.raises(ValueError, match="Choose images on the map first"):
            atlas.list_rows(which, [], "keep")


def test_names_on_the_map_are_no_tags():
    assert write_plainly("<b>x&lt;") == "&lt;b>x&amp;lt;"


def test_teachers_are_shown_in_their_order(explorer, trained):
    assert len(explorer.teachers) == 3
    shown = explorer.open_offered(0, 32)
    picture = explorer.draw_teachers(shown)
    assert picture.shape[1] >= 4 * shown.pixels.shape[1]
    last = weights.load(explorer.teachers[-1]).state_dict()
    assert all(torch.equal(value, last[name]) for name, value in weights.load(trained).state_dict().items())
    with pytest.raises(ValueError, match="start the explorer with a run directory"):
        Explorer(weights.load(trained), None, None, None).draw_teachers(shown)


def test_the_first_images_offered_are_of_different_classes(explorer):
    labels = [explorer.source.labels[i] for i in explorer._offered]
    assert {*labels[:3]} == {0, 1, 2}
    assert len({*explorer._offered}) == 24


def test_a_model_without_attention(album):
    model = dino.create("timm:resnet10t", image_size=64).eval()
    explorer = Explorer(model, None, str(album), None)
    shown = explorer.open_offered(0, 128)
    assert not explorer.model.has_attention
    assert shown.look is None
    assert draw_alike(shown, shown, (5, 5))[1] is not None
    assert shown.enlarge(shown.colors).shape == shown.enlarge().shape


@pytest.mark.parametrize("content", [b"", b"no image", b"\xff\xd8\xff\xe0 broken"])
def test_what_is_no_image_is_one_sentence(explorer, content, tmp_path):
    (file := tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"^This cannot be shown: .*\.$"):
        explorer.open_file(file, 32)


def test_huge_images_are_refused_before_they_are_decoded(explorer, tmp_path):
    Image.new("1", (10_000, 6_000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="too many pixels"):
        explorer.open_file(tmp_path / "huge.png", 32)


def test_narrow_images_are_refused_before_they_are_enlarged(explorer):
    height = 8 * MAX_PATCHES // 4
    assert explorer.show_pixels(np.zeros((height // 4, 8, 3), np.uint8), 32).features.shape[:2] == (MAX_PATCHES // 4, 4)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"too long and narrow for this size; .* crop the image\.$"):
        explorer.show_pixels(np.zeros((height * 4, 8, 3), np.uint8), 512)
    assert time.perf_counter() - began < 1


def test_an_embedding_of_another_model_is_refused(album, trained, saved_model, tmp_path, capsys):
    out = dino.embed(str(saved_model), str(album), tmp_path / "x.parquet", device="cpu").path
    assert main(["app", str(trained), "--embedding", str(out), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "was made by another model" in said
    assert said.count("\n") == 1
    good = dino.embed(str(trained), str(album), tmp_path / "y.parquet", device="cpu").path
    explorer = Explorer(weights.load(trained), None, None, str(good))
    assert len(explorer.find_nearest(explorer.open_offered(0, 32), 3)) == 3


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
    assert main(["app", str(trained), "--share-with", "203.0.113.7", "--device", "cpu"]) == 2
    assert (
        "--share-with 203.0.113.7 is no address of this machine (Cannot assign requested address"
        in capsys.readouterr().err
    )
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", str(trained)]) == 2
    assert "pip install 'dino-vision[app]'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- in a browser


@contextmanager
def served(*arguments: object, cwd: Path) -> Iterator[str]:
    """The printed address; Ctrl-C ends the command in order, and its temporary files are gone."""
    command = dino_command("app", *arguments, "--device", "cpu", "--no-browser")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests that run in the background would hand down that interrupts are ignored.
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    (scratch := cwd / "scratch").mkdir()
    environment = os.environ | {"TMPDIR": str(scratch)}
    process = subprocess.Popen(command, cwd=cwd, preexec_fn=heed, env=environment, **pipes)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("Ctrl-C ends it.\n"), process.communicate()
        yield process.stdout.readline().rstrip()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert "Traceback" not in said
        assert not list(scratch.glob("dino*"))
    finally:
        process.kill()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (or Google Chrome) in PATH")
def test_the_page_in_a_browser(trained, album, tmp_path, monkeypatch):
    """Newest run by itself; upload, slider, click, search, near-copies, checkpoints; a broken upload; no other host."""
    playwright = pytest.importorskip("playwright.sync_api")
    (tmp_path / "broken.jpg").write_text("no image")
    (tmp_path / "runs").symlink_to(trained.parent)
    asked = []
    monkeypatch.setenv("DINO_CACHE", str(tmp_path / "cache"))
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
        page.locator("#size input[type=number]").fill("96")
        page.locator("#size input[type=number]").press("Enter")
        mine = changes("#heads", mine)
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
        assert page.locator("#found .caption-label").first.evaluate("e => e.scrollWidth <= e.clientWidth")  # not cut
        captions = page.locator("#found .caption-label").all_inner_texts()
        assert {text.split()[1] for text in captions[:2]} == {"class1/001.jpg", "class1/copy.jpg"}
        page.get_by_role("tab", name="Near-copies").click()
        page.click("#look")
        page.get_by_text("of 41 images are near-copies").wait_for()
        clicked = page.locator("#group-0 .caption-label").nth(1)
        assert clicked.inner_text().startswith("✗ left out: class")
        page.locator("#group-0 button.thumbnail-item").nth(1).click()
        page.locator("#group-0").get_by_text("✓ kept").nth(1).wait_for()
        page.locator("#rest-name input, #rest-name textarea").fill("rest.txt")
        page.locator("#rest-name input, #rest-name textarea").press("Enter")
        page.get_by_text("dino train --data lists/rest.txt").wait_for()

        page.get_by_role("tab", name="Map").click()
        page.click("#draw-map")
        page.wait_for_selector("#map .points path")
        area = page.locator("#map .nsewdrag").bounding_box()
        left, top, right, bottom = 2, 2, area["width"] - 2, area["height"] - 2
        page.mouse.move(area["x"] + left, area["y"] + top)
        page.mouse.down()
        for x, y in ((right, top), (right, bottom), (left, bottom), (left, top)):
            page.mouse.move(area["x"] + x, area["y"] + y, steps=5)
        page.mouse.up()
        page.locator("#described").get_by_text("41 of 41 images").wait_for()
        page.wait_for_selector("#chosen img")
        page.locator("#tag input, #tag textarea").fill("mine")
        page.locator("#tag input, #tag textarea").press("Enter")
        page.locator("#chosen").get_by_text("· mine").first.wait_for()
        page.locator("#list-name input, #list-name textarea").fill("all.csv")
        page.locator("#list-name input, #list-name textarea").press("Enter")
        page.get_by_text("dino train --data lists/all.csv").wait_for()
        assert (tmp_path / "lists" / "all.csv").read_text().count(",mine\n") == 41
        page.reload()  # what was computed is there again
        page.get_by_role("tab", name="Map").click()
        page.wait_for_selector("#map .points path")
        page.get_by_text("Tags: mine (41)").wait_for()

        page.get_by_role("tab", name="Over time").click()
        page.click("#go")
        page.wait_for_selector("#over img")

        page.get_by_role("tab", name="Where it looks").click()
        page.locator("#first-file button").first.click()  # takes the file away
        before = pictures("#heads")
        page.set_input_files("#first-file input[type=file]", tmp_path / "broken.jpg")
        page.get_by_text("This cannot be shown: not an image (JPEG, PNG, WebP, BMP, TIFF or GIF).").wait_for()
        assert pictures("#heads") == before  # nothing is lost
        page.set_viewport_size({"width": 390, "height": 844})
        page.reload()
        page.wait_for_selector("#masks img")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text("Map", exact=True).click()
        page.wait_for_function("document.querySelector('#map .nsewdrag')?.getBoundingClientRect().height === 360")
        browser.close()
    assert asked
    origin = address.partition("?")[0]
    assert all(url.startswith((origin, "data:", "blob:")) for url in asked)


# ---------------------------------------------------------------------------------------------- who may use it


class Visitor:
    """Speaks HTTP with the page as a browser does, or as somebody who has read how a browser does."""

    def __init__(self, address: str):
        self.origin, _, self.token = address.partition("/?token=")
        self.http = httpx.Client(base_url=self.origin, timeout=60, follow_redirects=True)
        text = self.http.get("/", params={"token": self.token}).text  # leaves the cookie
        config, _ = json.JSONDecoder().raw_decode(text.partition("window.gradio_config = ")[2])
        self.functions = {one["api_name"]: one["id"] for one in config["dependencies"]}
        self.thumbnail = re.findall(r'"path": ?"([^"]*\.webp)"', text)[0]
        self.folder = Path(self.thumbnail).parents[1]

    def join(self, function: str, data: Any, event: Any = None, **options: Any) -> httpx.Response:
        call = {"fn_index": self.functions[function], "data": data, "event_data": event, "session_hash": "mine"}
        return self.http.post("/gradio_api/queue/join", content=json.dumps(call), headers=JSON | options)

    def call(self, function: str, data: Any, event: Any = None) -> Any:
        """What the function returned, or its error as a text."""
        assert self.join(function, data, event).status_code == 200
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "mine"}) as lines:
            messages = (json.loads(line.removeprefix("data: ")) for line in lines.iter_lines() if line)
            done = next(message for message in messages if message["msg"] == "process_completed")
        return done["output"]["data"] if done["success"] else str(done["output"]["error"])

    def upload(self, content: bytes) -> httpx.Response:
        return self.http.post("/gradio_api/upload", files={"files": ("mine.png", content)})


JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def visitor(trained, album, tmp_path_factory) -> Iterator[Visitor]:
    with served(trained, "--data", album, cwd=tmp_path_factory.mktemp("served")) as address:
        yield (visitor := Visitor(address))
        visitor.http.close()


def test_the_page_answers_this_machine_alone(visitor):
    port = int(visitor.origin.rpartition(":")[2])
    others = {found[4][0] for found in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {"127.0.0.1"}
    for host in others:
        with pytest.raises(OSError), socket.create_connection((host, port), timeout=2):  # noqa: PT011
            pass
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    assert os.environ.get("GRADIO_SHARE") is None


def test_the_printed_address_leaves_a_cookie(visitor):
    first = httpx.get(visitor.origin, params={"token": visitor.token})
    assert (first.status_code, first.headers["location"]) == (303, "/")
    assert re.fullmatch(rf"dino-\d+={visitor.token}; HttpOnly; Path=/; SameSite=strict", first.headers["set-cookie"])
    link = httpx.get(visitor.origin, params={"token": visitor.token}, headers={"sec-fetch-site": "cross-site"})
    assert (link.status_code, link.headers["refresh"]) == (200, "0; url=/")  # no redirect, which would lack the cookie
    assert visitor.http.get("/").status_code == 200
    assert visitor.http.get("/", headers={"origin": visitor.origin}).status_code == 200
    other_port = {"host": "localhost:8000", "origin": "http://localhost:8000"}  # ssh -L 8000:127.0.0.1:7860
    assert visitor.http.get("/", headers=other_port).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"cookie": ""},
        {"cookie": "dino-{port}=wrong"},
        {"cookie": "dino-{port}=\u00e4".encode()},
        {"host": "evil.example:{port}"},
        {"host": "evil.example:{port}", "origin": "http://evil.example:{port}"},
        {"host": "127.0.0.1.evil.example"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "null"},
    ],
)
def test_strangers_and_pages_of_other_sites_are_refused(visitor, headers):
    port = visitor.origin.rpartition(":")[2]
    sent = {name: value if isinstance(value, bytes) else value.format(port=port) for name, value in headers.items()}
    for asked in (
        "GET /",
        "GET /?token=wrong",
        "GET /theme.css",
        "GET /assets/index.js",
        f"GET /gradio_api/file={visitor.thumbnail}",
        "GET /gradio_api/queue/data?session_hash=mine",
        "GET /gradio_api/heartbeat/mine",
        "POST /gradio_api/queue/join",
        "POST /gradio_api/upload",
        "OPTIONS /gradio_api/upload",
    ):
        answer = visitor.http.request(*asked.split(), headers=sent)
        assert answer.status_code == 403
        assert re.fullmatch(r"[^.]+\.", answer.text)
        assert not [name for name in answer.headers if name.startswith(("access-control", "set-cookie"))]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=/etc/there-is-no-such-file"),
        ("GET", "/gradio_api/file={folder}/../../../../../../etc/passwd"),
        ("GET", "/gradio_api/file={folder}/%2e%2e/%2e%2e/etc/passwd"),
        ("GET", "/gradio_api/file={folder}"),
        ("GET", "/gradio_api/file=pyproject.toml"),
        ("GET", "/gradio_api/file=http://127.0.0.1/"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("GET", "/gradio_api/deep_link?session_hash=mine"),
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/run-history/buckets"),
        ("GET", "/gradio_api/startup-events"),
        ("GET", "/gradio_api/stream/mine/1/1/playlist-file"),
        ("GET", "/config"),
        ("GET", "/monitoring"),
        ("GET", "/docs"),
        ("POST", "/gradio_api/call/_open_pick"),
        ("POST", "/gradio_api/run/_open_pick"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/login"),
        ("DELETE", "/"),
    ],
)
def test_only_what_the_page_needs_is_served(visitor, method, path):
    answer = visitor.http.request(method, path.format(folder=visitor.folder))
    assert (answer.status_code, answer.text) == (403, "The explorer does not serve this.")
    assert visitor.http.get(f"/gradio_api/file={visitor.thumbnail}").headers["content-type"] == "image/webp"


OUTSIDE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "data",
    [
        [OUTSIDE, 64],
        [64, OUTSIDE],
        [{"inner": [OUTSIDE]}, 64],
        [OUTSIDE | {"path": "http://127.0.0.1/x.png"}, 64],
        [OUTSIDE | {"path": None}, 64],
        [OUTSIDE | {"path": "{folder}/../x.png"}, 64],
    ],
)
def test_a_path_outside_the_folder_goes_no_further(visitor, data):
    data = json.loads(json.dumps(data).replace("{folder}", str(visitor.folder)))
    answer = visitor.join("_open_upload", data)
    assert (answer.status_code, answer.text) == (400, "The page does not send such a request.")


def test_what_is_no_call_is_refused(visitor):
    for content in (b"", b"no json", b"[" * 30_000, b'{"data": ' + b"9" * 5000 + b"}"):
        assert visitor.http.post("/gradio_api/queue/join", content=content, headers=JSON).status_code == 400
    assert visitor.http.post("/gradio_api/queue/join", content=b" " * 2**17, headers=JSON).status_code == 413


PICTURE = "/usr/share/pixmaps/picture.png"


def test_a_pick_is_a_position(visitor, album):
    """The control first: such a request reaches the function, and a position is served."""
    assert visitor.call("_open_pick", [64], {"index": 1, "value": None}) == [None]
    heads, *_ = visitor.call("_draw_first", [None, 0.6])
    assert len(heads) == 4
    own = str(album / "class0" / "000.jpg")  # exists, and can be read
    for index in (own, PICTURE, "/etc/passwd", "1", -1, 24, 10**40, 1.0, float("nan"), True, None, [0], {"0": 0}):
        said = visitor.call("_open_pick", [64], {"index": index, "value": None})
        assert said == "The position of an image must be a whole number from 0 to 23."
    for event in (None, [], "index", {}, 5):
        assert "must be a whole number" in visitor.call("_open_pick", [64], event)


@pytest.mark.parametrize("size", [31, 513, 1e9, -64, 64.0, float("nan"), "64", [64], True, None, {"x": 1}])
def test_a_size_is_one_of_the_slider(visitor, size):
    assert visitor.call("_open_pick", [size], {"index": 0}) == "The shorter side must be a whole number from 32 to 512."


def test_points_and_shares_are_checked(visitor):
    visitor.call("_open_pick", [64], {"index": 0})
    assert len(visitor.call("_compare_to_first", [None, None], {"index": [9, 9]})) == 2
    for index in (PICTURE, 3, None, [], [9], [9, 9, 9], [-1, 9], [9, 10**9], [9.5, 9], ["9", 9], [[9], 9], {"x": 9}):
        said = visitor.call("_compare_to_first", [None, None], {"index": index})
        assert re.match(r"A point must be (two numbers, x and y|a whole number from 0 to \d+)\.$", said)
    assert visitor.call("_draw_masks", [None, 0.5])[0]
    for mass in (0, -1, 1.5, 1e9, float("nan"), float("inf"), "0.5", [0.5], None):
        assert "must be a number above 0 and up to 1" in visitor.call("_draw_masks", [None, mass])
    assert visitor.call("_resize", [{"original": PICTURE}, 64]) == [None]  # a state is the server's, whatever is sent


def test_an_upload_is_read_once_and_deleted(visitor, album):
    content = (album / "class0" / "000.jpg").read_bytes()
    (path,) = visitor.upload(content).json()
    assert Path(path).read_bytes() == content
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert visitor.call("_open_upload", [file, 64]) == [None]
    assert not Path(path).exists()
    others = [file, file | {"path": visitor.thumbnail}, file | {"path": f"{visitor.folder}/missing.png"}, None]
    assert {visitor.call("_open_upload", [other, 64]) for other in others} == {"Choose a file first."}
    assert Path(visitor.thumbnail).exists()
    assert visitor.upload(bytes(guard.LARGEST_UPLOAD + 2**17)).status_code == 413


def test_the_oldest_files_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "MOST_KEPT", 350)
    for age, name in enumerate(("new", "later", "early", "old", "thumbnail")):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (0, 1000 - age))
    guard.delete_oldest(str(tmp_path), {str(tmp_path / "thumbnail")})
    assert {file.name for file in tmp_path.iterdir()} == {"new", "later", "early", "thumbnail"}
    monkeypatch.setattr(guard, "MOST_FILES", 1)
    guard.delete_oldest(str(tmp_path), {str(tmp_path / "thumbnail")})
    assert {file.name for file in tmp_path.iterdir()} == {"new", "thumbnail"}


def test_the_browser_opens_by_a_file_that_does_not_show_the_token(tmp_path, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    open_browser("http://127.0.0.1:7860/?token=secret", tmp_path)
    deadline = time.monotonic() + 10
    while not opened and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "secret" not in opened[0]
    assert "url=http://127.0.0.1:7860/?token=secret" in Path(opened[0].removeprefix("file://")).read_text()
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY"):
        monkeypatch.delenv(name, raising=False)
    assert has_display() == (sys.platform in ("darwin", "win32"))
    monkeypatch.setenv("DISPLAY", ":0")
    assert has_display()
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 50000 10.0.0.2 22")
    assert not has_display()


def ask(keeper: guard.Guard, headers: dict[str, str], parts: list[bytes], path: str = "/gradio_api/upload") -> int:
    """The status that is answered to a POST of which only `parts` arrive."""
    sent: list[Any] = []
    waiting = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def receive() -> Any:
        return waiting.pop(0) if waiting else await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": raw}
    asyncio.run(keeper(scope, receive, send))
    return sent[0]["status"]


def test_a_body_that_does_not_arrive_is_given_up(tmp_path):
    with guard.listen("127.0.0.1", 0) as listening:
        keeper = guard.Guard(lambda *_: pytest.fail("nothing arrived"), str(tmp_path), "127.0.0.1", listening)
    keeper.seconds = 0.1
    cookie = {"cookie": f"{keeper.cookie}={keeper.token}", "host": "127.0.0.1"}
    assert ask(keeper, cookie, [b"some"]) == 408
    assert ask(keeper, cookie | {"cookie": ""}, []) == 403  # nothing is received from strangers
    assert ask(keeper, cookie, [bytes(2**20)] * 41) == 413


@pytest.mark.parametrize(("host", "name"), [("0.0.0.0", socket.gethostname()), ("127.0.0.2", "127.0.0.2")])
def test_other_machines_need_the_token_as_well(tmp_path, host, name):
    with guard.listen(host, None) as listening:
        keeper = guard.Guard(lambda *_: pytest.fail("never"), str(tmp_path), host, listening)
        port = listening.getsockname()[1]
    assert keeper.address == f"http://{name}:{port}/?token={keeper.token}"
    cookie = {"cookie": f"{keeper.cookie}={keeper.token}", "host": f"{name}:{port}"}
    assert ask(keeper, cookie, [], "/x") == 403
    assert ask(keeper, cookie | {"origin": "http://evil.example"}, []) == 403
    assert ask(keeper, cookie | {"cookie": ""}, []) == 403
    status = ask(keeper, cookie | {"host": "evil.example"}, [bytes(2**20)] * 41)
    assert status == (413 if host == "0.0.0.0" else 403)  # 0.0.0.0 has names that only others know
