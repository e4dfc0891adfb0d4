"""What Python callers get back, as a terminal and as a notebook show it."""

from __future__ import annotations

from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient

import dino
from helpers import TINY, draw_images


def test_results_show_themselves(tmp_path):
    images = draw_images(tmp_path / "photos")
    run = dino.train(data=images, out=tmp_path / "run", **TINY | {"epochs": 1, "report": True})
    assert run == tmp_path / "run"
    assert run.report.is_file()
    shown = run._repr_html_()
    assert shown is not None
    assert run.verdict[0].startswith("Verdict: ")
    assert run.verdict[0] in shown
    assert str(run.report) in shown
    assert "<svg viewBox" in shown
    assert (run / "config.toml")._repr_html_() is None  # which is no run, nor one of these

    embedding = dino.embed(run, images, tmp_path / "e.parquet")
    count = embedding.rows
    assert repr(embedding) == f"Folder('{tmp_path}/e.parquet': {count} features of {embedding.dim} numbers)"
    assert repr(embedding.read()) == f"Embedding in memory of {embedding!r}"
    first = embedding.read().names[0]
    found = dino.search(embedding.path, [images / first], k=3)
    lines = repr(found).splitlines()
    assert lines[0] == f"The 3 of {count} images most like each of 1:"
    assert lines[1] == str(images / first)
    assert lines[2] == f"   1.0000  {first}"
    assert len(lines) == 5
    assert found._repr_html_().count("<img src=") == 4

    model = dino.load(run)
    pixels = np.zeros((64, 64, 3), np.uint8)
    for drawn in (
        dino.attention_maps(model, pixels),
        *dino.pca_colors(model, [pixels]),
        dino.match_patches(model, pixels, pixels),
    ):
        assert drawn._repr_png_().startswith(b"\x89PNG")
        assert len(repr(drawn)) < 100

    (images / first).unlink()
    assert found._repr_html_() is None


def test_names_in_a_page_are_escaped(tmp_path):
    images = draw_images(tmp_path / "<b>photos", 12)
    for path in sorted(Path(images).rglob("*.jpg")):
        path.rename(path.with_name(f"<i>{path.name}"))
    model = dino.create("vit_nano", patch_size=8, image_size=32)
    embedding = dino.embed(model, images, tmp_path / "e.parquet")
    query = next(Path(images).rglob("*.jpg"))
    shown = dino.search(embedding.path, query, k=2, model=model)._repr_html_()
    assert shown.count("&lt;i&gt;") == 3
    assert "<i>" not in shown


class Watched(NotebookClient):
    """Keeps what the output of a cell becomes while it runs."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "update_display_data":
            self.seen = [*getattr(self, "seen", []), msg["content"]["data"]["text/html"]]
        return super().process_message(msg, cell, cell_index)


def test_curves_grow_in_a_notebook_while_it_trains(tmp_path):
    images = draw_images(tmp_path / "photos")
    options = TINY | {"data": str(images), "out": str(tmp_path / "run"), "epochs": 3, "log.knn_every": 1}
    code = f"import dino\nrun = dino.train(**{options!r})\nrun"
    watched = Watched(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), timeout=300)
    watched.execute()
    assert len(watched.seen) > 1
    lengths = [len(drawn) for drawn in watched.seen]
    assert lengths == sorted(lengths), "each has the points before, and more"
    assert lengths[0] < lengths[-1]
    assert all("<svg viewBox" in drawn and "Verdict" not in drawn for drawn in watched.seen)
    outputs = watched.nb.cells[0].outputs
    assert "Verdict: " in outputs[-1].data["text/html"]
