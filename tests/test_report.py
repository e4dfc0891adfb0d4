"""The report: one well-formed, self-contained page for any run, however odd its data or early its end."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import dino
from conftest import TINY, draw_images, run_dino
from dino.config import TrainOptions, replace

VOID = {"meta", "img", "br", "hr", "link", "input", "image", "rect", "path", "use", "circle", "line"}
OPTIONS = replace(TrainOptions(), TINY | {"report": True})


class Page(HTMLParser):
    """Collects headings, links and text; complains about tags that do not close."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.targets: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.targets += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.targets += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def read(run) -> tuple[str, Page]:
    path = run / "report.html"
    assert path.stat().st_size < 5e6
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(t.startswith(("data:", "#")) for t in page.targets)
    assert "http://" not in text.replace("http://www.w3.org", "")
    return text, page


SECTIONS = [
    "Result",
    "Where it looks",
    "What it takes for alike",
    "Nearest neighbours",
    "What it trained on",
    "Training",
]


def test_a_labelled_run_has_every_section(photos, tmp_path):
    text, page = read(dino.train(OPTIONS, data=str(photos), out=str(tmp_path / "run")))
    assert page.headings[:6] == SECTIONS
    assert "k-NN" in text
    assert "kept at" not in text
    assert "vit_nano" in text
    assert sum(t.startswith("data:image") for t in page.targets) > 20


def test_scenes_show_overlap_with_the_objects(tmp_path):
    text, _ = read(dino.train(OPTIONS, data="scenes:60", out=str(tmp_path / "run"), epochs=1))
    assert "Jaccard" in text


def test_an_unlabelled_run_stopped_at_once_says_how_to_go_on(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in draw_images(tmp_path / "drawn", 12).rglob("*.jpg"):
        path.rename(folder / path.name)
    run = dino.train(OPTIONS, data=str(folder), out=str(tmp_path / "run"), stop_after=1, **{"data.val_fraction": 0.0})
    text, page = read(run)
    assert page.headings[:6] == SECTIONS
    assert "dino train --resume" in text
    assert "ffective rank" in text


def test_names_are_escaped_and_odd_images_and_cut_metrics_are_survived(photos, tmp_path):
    odd = photos / "<b>&class"
    odd.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(300, 9), (9, 300), (1, 1), (17, 33)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(odd / f"<script>{i}&.png")
    run = dino.train(OPTIONS, data=str(photos), out=str(tmp_path / "run"), **{"data.max_bad_fraction": 1.0})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    next((photos / "class0").glob("*.jpg")).write_bytes(b"")
    done = run_dino("report", run)
    assert done.returncode == 0, done.stderr
    text, _ = read(run)
    assert "<script>" not in text
    assert "<b>&class" not in text


def test_the_page_is_the_same_when_written_again(photos, tmp_path):
    run = dino.train(OPTIONS, data=str(photos), out=str(tmp_path / "run"), epochs=1)
    first = (run / "report.html").read_text()
    assert run_dino("report", run).returncode == 0
    assert (run / "report.html").read_text() == first


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_no_run_is_one_sentence(folder, tmp_path):
    done = run_dino("report", tmp_path / folder)
    assert done.returncode == 2
    assert "holds no run" in done.stderr
