"""The report: one well-formed, self-contained page for any run, however odd its data or early its end."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import shutil
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dino
from dino.cli import main
from dino.data.image_files import open_source
from dino.data.sources import hold_out
from dino.engine.log import read_metrics
from dino.html import render
from dino.options import replace, required
from dino.options.train import TrainOptions
from dino.report.curves import draw_chart, list_charts
from dino.report.gallery import choose_pictures, shrink
from dino.report.page import write_report
from dino.report.run import Run
from helpers import TINY, draw_images, run_dino

VOID = {"meta", "img", "br", "wbr", "hr", "link", "input", "image", "rect", "path", "use", "circle", "line"}
OPTIONS = replace(TrainOptions(), TINY | {"report": True})


class Page(HTMLParser):
    """Collects headings, links and text; complains about tags that do not close."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.targets: list[str] = []
        self.headings: list[str] = []
        self.titles: list[str | None] = []
        self.texts: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.targets += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.titles += [v for k, v in attrs if k == "title"]
        if tag == "img":  # the page would move below a link's target when its pictures come
            assert {"width", "height"} & {*dict(attrs)}, attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.targets += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.add(data.strip())
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


ODD_CLASS = "<b>x\u2215b>\"&'"  # a slash cannot be in the name of a folder
SOURCE = Path(dino.__file__).parent
SECTIONS = [
    "Result",
    "Where it looks",
    "What it takes for alike",
    "Nearest neighbors",
    "What it trained on",
    "Training",
]


def test_a_labeled_run_has_every_section(photos, tmp_path):
    text, page = read(dino.train(OPTIONS, data=str(photos), out=str(tmp_path / "run")))
    assert page.headings[:6] == SECTIONS
    assert "k-NN" in text
    assert "kept at" not in text
    assert "vit_nano" in text
    assert sum(t.startswith("data:image") for t in page.targets) > 20
    looks = [re.search(r";base64,([^\"]+)", part) for part in text.split('<div class="looks')[1:]]
    shapes = [Image.open(io.BytesIO(base64.b64decode(found[1]))).size for found in looks if found]
    assert len(shapes) == 2
    assert any(width != height for width, height in shapes), "photographs in their own shape"


def test_a_photograph_with_attention_is_neither_huge_nor_long():
    for before, after in (((3000, 4000), (480, 640)), ((100, 1000), (100, 200)), ((900, 50), (100, 50))):
        assert shrink(np.zeros((*before, 3), np.uint8)).shape == (*after, 3)


@pytest.mark.slow
def test_scenes_show_overlap_with_the_objects_and_mark_the_largest(tmp_path):
    run = dino.train(OPTIONS, data="scenes:60", out=str(tmp_path / "run"), epochs=1, seed=1)
    text, _ = read(run)
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert (
        f"best head {last['jaccard_best_head']:.1f} %, mean map {last['jaccard_mean_map']:.1f} %, "
        f"average over heads {last['jaccard_mean_head']:.1f} %." in " ".join(text.split())
    )
    rows = text.split('<div class="looks')[1:]
    marked = [
        re.findall(r'<figure class="pair( best)?">.*?<figcaption>(.*?) <b>(\d+)&', row, re.DOTALL) for row in rows
    ]
    assert len(marked) == 6
    for heads in marked:
        assert [name for _, name, _ in heads] == ["head 0", "head 1", "mean map"]
        assert max(int(overlap) for _, _, overlap in heads) == next(int(overlap) for best, _, overlap in heads if best)
    # The mean of the heads' maps may be the best; it was never marked.
    assert any(best and name == "mean map" for heads in marked for best, name, _ in heads)


def test_an_unlabeled_run_stopped_at_once_says_how_to_go_on(tmp_path):
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
    odd = photos / ODD_CLASS
    odd.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(300, 9), (9, 300), (1, 1), (17, 33)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(odd / f"<script>{i}&.png")
    run = dino.train(OPTIONS, data=str(photos), out=str(tmp_path / "<i>run'\"&"), **{"data.max_bad_fraction": 1.0})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    next((photos / "class0").glob("*.jpg")).write_bytes(b"")
    done = run_dino("report", run)
    assert done.returncode == 0, done.stderr
    text, page = read(run)
    assert "<script>" not in text
    assert "<b>x" not in text
    assert f"{escape('<b>x')}\u2215b" in text
    assert any(ODD_CLASS in text for text in page.texts)
    assert "<i>run'\"&" in page.texts  # the title


def test_html_is_made_by_templates_alone():
    """Only the templates write tags, and Jinja2 alone escapes what is put into them; nothing there turns that off."""
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"\bescape\(|</(?!svg|metadata)\w+>|<(p|b|i|br|div|span|figure|h\d|img|table|ul|li)\b[^>]*>", text
        ), path
    for path in SOURCE.rglob("*.html.jinja"):
        text = path.read_text(encoding="utf-8").replace('"/<wbr>" | safe', "")
        assert not re.search(r"\bsafe\b|autoescape", text), path


def test_names_are_escaped_on_pages_of_an_embedding(saved_model, tmp_path):
    folder = tmp_path / "photos" / ODD_CLASS
    folder.mkdir(parents=True)
    for i, path in enumerate(sorted(draw_images(tmp_path / "drawn", 12).rglob("*.jpg"))):
        if i == 1:
            shutil.copy(path, os.path.join(os.fsencode(folder), b"<script>caf\xe9'\"copy.jpg"))
        os.rename(path, os.path.join(os.fsencode(folder), b"<script>caf\xe9'\"%d.jpg" % i))
    out = dino.embed(str(saved_model), str(tmp_path / "photos"), tmp_path / "<i>'\".parquet", device="cpu").path
    query = draw_images(tmp_path / "queries", 1) / "class0" / "000.jpg"
    query = query.rename(query.with_name("<script>'.jpg"))
    for arguments in (
        ["search", str(out), str(query)],
        ["duplicates", str(out)],
        ["outliers", str(out)],
    ):
        file = tmp_path / f"{arguments[0]}.html"
        assert main([*arguments, "--html", str(file)]) == 0
        text = file.read_text(encoding="utf-8")
        page = Page(text)
        assert "<script>" not in text
        assert "<i>" not in text
        assert "<i>'\".parquet" in page.texts
        assert any(f"{ODD_CLASS}/<script>caf" in str(name) for name in page.titles)


def test_every_chart_has_its_caption(run):
    drawn = {
        name for chart in list_charts(Run.read(run, 22)) for panel in chart.panels for name in panel.series.values()
    }
    metrics = drawn | {"jaccard_best_head", "target_spread", "loss"}
    lines = [{"step": step} | dict.fromkeys(metrics, 1.0) for step in (0, 10)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    read_again = Run.read(run, 22)
    charts = list_charts(read_again)
    assert len(charts) == 11
    text = render("training", run=read_again, charts=[(c, *draw_chart(c, read_again)) for c in charts], pages={})
    assert text.count("</svg>") == text.count("</p>") == 11


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A labeled run, and its images; tests change copies of it."""
    folder = tmp_path_factory.mktemp("finished")
    photos = draw_images(folder / "photos")
    return dino.train(OPTIONS, data=str(photos), out=str(folder / "run")), photos


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "run")


def rewrite(run, photos) -> tuple[str, Page]:
    source, held_out = hold_out(open_source(str(photos)), 0.1, 1000, 0)
    write_report(run, source, held_out, torch.device("cpu"))
    return read(run)


def test_the_page_is_the_same_when_written_again(finished, run):
    first = (finished[0] / "report.html").read_text()
    assert rewrite(run, finished[1])[0].replace(str(run), str(finished[0])) == first


def test_every_picture_is_an_image(finished):
    _, page = read(finished[0])
    for target in page.targets:
        if target.startswith("data:"):
            kind, _, data = target.partition(";base64,")
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                image.load()
                assert kind == f"data:image/{str(image.format).lower()}"


def test_the_headline_is_what_was_measured(finished, run):
    text, _ = rewrite(run, finished[1])
    measured = [line for line in read_metrics(run / "metrics.jsonl") if "knn10_top1" in line]
    for value in (measured[0]["knn10_top1"], measured[0]["pixels_knn10_top1"], measured[-1]["knn10_top1"]):
        assert f"<span>{value:.1f} %</span>" in text
    assert "22 images, 3 classes" in text
    assert "--resume" not in text


def test_colors_of_curves_follow_the_page(finished):
    text, _ = read(finished[0])
    assert "var(--c1)" in text
    assert "#0a0b" not in text


def test_collapse_and_unreadable_images_are_told(finished, run):
    values = {"teacher_entropy": math.log(64), "kl": 0.0, "prototype_usage": 4.1, "teacher_temp": 0.04}
    lines = [{"step": step, "epoch": 1.0} | values for step in range(10, 90, 10)]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 80, "collapse": 1.0}])
    )
    bad = [{"image": f"<i>{i}.jpg", "reason": "truncated"} for i in range(7)]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    text, _ = rewrite(run, finished[1])
    assert "uniform collapse" in text
    assert "7 images could not be read" in text
    assert "&lt;i&gt;4.jpg</code>: truncated" in text
    assert "and 2 more" in text
    assert "<i>4" not in text


@pytest.mark.parametrize("metrics", ["", '{"step": 1, "lo', '{"step": 0, "epoch": 0.0, "effective_rank": 3.0}\n', None])
def test_a_run_that_measured_little_has_its_page(finished, run, metrics):
    if metrics is None:
        (run / "metrics.jsonl").unlink()
    else:
        (run / "metrics.jsonl").write_text(metrics)
    text, page = rewrite(run, finished[1])
    assert page.headings[:6] == SECTIONS
    assert f"dino train --resume {run}" in text


def test_losses_that_are_no_numbers_and_long_runs_are_drawn(finished, run):
    lines = [
        {"step": i, "epoch": i / 5, "loss": 1.0, "teacher_entropy": 1.0, "kl": 0.5, "grad_norm": i} for i in range(5000)
    ]
    lines[7] |= {"teacher_entropy": math.nan, "grad_norm": math.inf}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewrite(run, finished[1])
    assert (run / "report.html").stat().st_size < 1e6


def test_names_that_are_no_unicode_and_images_that_vanished(tmp_path):
    photos = draw_images(tmp_path / "photos", 12)
    for i, path in enumerate(sorted(photos.rglob("*.jpg"))):
        os.rename(path, os.path.join(os.fsencode(path.parent), b"caf\xe9%d.jpg" % i))
    run = dino.train(OPTIONS, data=str(photos), out=str(tmp_path / "run"), epochs=1)
    read(run)
    for path in photos.rglob("*.jpg"):
        path.write_bytes(b"")
    text, page = rewrite(run, photos)
    assert "None of the images tried could be read" in text
    assert "Training" in page.headings


def test_pictures_are_spread_over_the_data_and_its_classes(photos):
    source = open_source(str(photos))
    chosen = [picture.position for picture in choose_pictures(source, 3)]
    assert {int(required(source.labels)[i]) for i in chosen} == {0, 1, 2}
    positions = [picture.position for picture in choose_pictures(open_source(str(photos), labels="none"), 6)]
    assert positions == sorted(set(positions))
    assert positions[0] == 0
    assert positions[-1] == len(source) - 1


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_no_run_is_one_sentence(folder, tmp_path):
    done = run_dino("report", tmp_path / folder)
    assert done.returncode == 2
    assert "holds no run" in done.stderr
