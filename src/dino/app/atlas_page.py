"""The tabs of the explorer's page that show all images: the map with its lasso, and groups of near-copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData

from dino import files
from dino.app.atlas import CHOSEN, NOTHING, NUM_GROUPS, OTHERS, TAGGED, Atlas
from dino.app.explorer import Explorer

MAP = """All images: those with similar features lie near each other (PCA, then t-SNE). **Draw around some** with the lasso
(with Shift, around more of them), or click on one; a click on a class hides or shows it. Then tag them, or write them to a
list."""
COPIES = """Images that are all but the same: resized, recompressed, slightly cropped, or taken a moment later. The first of
each group is the best to keep."""
SCRIPT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
RAW: Any = {"preprocess": False}
PLAIN: Any = {"show_label": False, "interactive": False, "buttons": []}  # of pictures
SHAPE: Any = {"object_fit": "contain", "elem_classes": ["tight", "small"], "allow_preview": False}
ONE_AT_A_TIME: Any = {"concurrency_id": "index", "concurrency_limit": 1}  # images are indexed once
QUIET: Any = {"show_progress": "hidden"}


@contextlib.contextmanager
def show_errors() -> Iterator[None]:
    """Around the work for a visitor: an error is one sentence on the page, and the page stays as it was."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error


def get_index(event: gr.EventData) -> Any:
    """What was clicked, as the request says; `gr.SelectData` would fail if it says nothing."""
    return event._data.get("index") if isinstance(event._data, dict) else None


class AtlasTabs:
    """Components and their events; `lists` is the folder for lists. A visitor's selection is the state `rows`."""

    def __init__(self, explorer: Explorer, lists: Path):
        self.explorer, self.lists = explorer, lists
        self.total = 0 if explorer.source is None else len(explorer.source)

    def add_script(self) -> None:
        """Outside of tabs: what is in one only begins to work when the tab is opened."""
        self.lasso = gr.HTML(js_on_load=SCRIPT, visible="hidden")

    def add_map(self) -> None:
        gr.Markdown(MAP)
        self.go = gr.Button(f"Map the {self.total:,} images", variant="primary", elem_id="draw-map")
        self.state = gr.Markdown(elem_id="map-state")
        self.plot = gr.Plot(show_label=False, visible=False, elem_id="map", buttons=[])
        self.rows = gr.State([])
        with gr.Column(visible=False) as self.tools:
            self.described = gr.Markdown(NOTHING, elem_id="described")
            with gr.Row():
                self.tag = gr.Textbox(label="Tag the images chosen", placeholder="blurry", elem_id="tag", scale=3)
                self.add = gr.Button("Add the tag", elem_id="add-tag")
                self.remove = gr.Button("Take it away", elem_id="remove-tag")
            self.tags = gr.HTML(elem_id="tags")
            with gr.Row():
                self.which = gr.Radio([CHOSEN, OTHERS, TAGGED], value=CHOSEN, label="Write to a list", elem_id="which")
                self.name = self._add_name("selection.csv", "list-name")
                self.write = gr.Button("Write the list", elem_id="write-list")
            self.written = gr.Markdown(elem_id="written")
            self.chosen = gr.Gallery(columns=8, elem_id="chosen", **SHAPE, **PLAIN)

    def add_copies(self) -> None:
        gr.Markdown(COPIES)
        self.look = gr.Button("Look for near-copies", variant="primary", elem_id="look")
        self.said = gr.Markdown(elem_id="said")
        self.page = gr.Slider(1, 2, 1, step=1, label="Page", visible=False, elem_id="page")
        self.groups = [
            gr.Gallery(columns=6, visible=False, elem_id=f"group-{i}", **SHAPE, **PLAIN | {"show_label": True})
            for i in range(NUM_GROUPS)
        ]
        with gr.Row(visible=False) as self.rest:
            self.rest_name = self._add_name("without-copies.txt", "rest-name")
            self.write_rest = gr.Button("Write all images but those left out", elem_id="write-rest")
        self.rest_written = gr.Markdown(elem_id="rest-written")

    def _add_name(self, name: str, where: str) -> Any:
        label = f"Name of the list, .txt or .csv; it goes to {self.lists}/"
        return gr.Textbox(name, label=label, elem_id=where, scale=3)

    def connect(self, blocks: gr.Blocks) -> None:
        mapped = [self.go, self.state, self.plot, self.tools, self.tags]
        pages = [self.look, self.said, self.page, self.rest, *self.groups]
        self.indexed = [
            self.go.click(self._draw_map, None, mapped, **ONE_AT_A_TIME),
            self.look.click(self._find_copies, None, pages, **ONE_AT_A_TIME),
        ]
        blocks.load(self._draw_again, None, [*mapped, *pages], **QUIET)
        self.lasso.select(self._choose, None, [self.rows, self.described, self.chosen], **QUIET)
        tagged: Any = {"inputs": [self.rows, self.tag], "outputs": [self.chosen, self.tags]} | QUIET | RAW
        gr.on([self.tag.submit, self.add.click], self._add_tag, **tagged)
        self.remove.click(self._remove_tag, **tagged)
        listed = [self.rows, self.which, self.tag, self.name]
        gr.on([self.name.submit, self.write.click], self._write_list, listed, self.written, **QUIET | RAW)
        gr.on(
            [self.rest_name.submit, self.write_rest.click], self._write_rest, self.rest_name, self.rest_written, **RAW
        )
        self.page.release(self._turn_page, self.page, pages, **QUIET | RAW)
        for slot, gallery in enumerate(self.groups):
            gallery.select(self._make_toggle(slot), self.page, [self.said, gallery], **QUIET | RAW)

    # --- the map ---------------------------------------------------------------------------------------------------

    def _index(self) -> Iterator[str]:
        """What to say while the images are indexed, if they are not yet."""
        if self.explorer.atlas is None:
            with show_errors():
                for done, total in self.explorer.index_images(files.cache_folder() / "embeddings"):
                    yield f"Indexing: {done:,} of {total:,} images ..."

    def _draw_map(self) -> Any:
        others = [gr.skip()] * 3
        for said in self._index():
            yield gr.skip(), said, *others
        said = f"Placing {self.total:,} images. This is done once, and may take a minute."
        yield gr.skip(), said, *others
        with show_errors():
            yield self._show_map(self._get_atlas())

    def _show_map(self, atlas: Atlas) -> tuple[Any, ...]:
        plot = PlotData(type="plotly", plot=atlas.draw_map())
        shown = gr.update(value=plot, visible=True), gr.update(visible=True)
        return gr.update(visible=False), "", *shown, atlas.describe_tags()

    def _draw_again(self) -> Any:
        """What was computed before, when the page is loaded."""
        atlas = self.explorer.atlas
        done = {} if atlas is None else atlas.__dict__  # of its cached properties
        mapped = self._show_map(self._get_atlas()) if "points" in done else [gr.skip()] * 5
        return *mapped, *(self._draw_page(1) if "copies" in done else [gr.skip()] * (4 + NUM_GROUPS))

    @show_errors()
    def _choose(self, event: gr.EventData) -> Any:
        atlas = self._get_atlas()
        rows = atlas.choose(get_index(event))
        return rows, atlas.describe(rows), atlas.draw_chosen(rows)

    @show_errors()
    def _add_tag(self, rows: list[int], tag: object) -> Any:
        return self._tag(rows, tag)

    @show_errors()
    def _remove_tag(self, rows: list[int], tag: object) -> Any:
        return self._tag(rows, tag, remove=True)

    def _tag(self, rows: list[int], tag: object, remove: bool = False) -> Any:
        (atlas := self._get_atlas()).tag(rows, tag, remove)
        return atlas.draw_chosen(rows), atlas.describe_tags()

    @show_errors()
    def _write_list(self, rows: list[int], which: object, tag: object, name: object) -> str:
        atlas = self._get_atlas()
        return atlas.write_list(self.lists, name, atlas.list_rows(which, rows, tag))

    # --- near-copies -----------------------------------------------------------------------------------------------

    def _find_copies(self) -> Any:
        others = [gr.skip()] * (2 + NUM_GROUPS)
        for said in self._index():
            yield gr.skip(), said, *others
        yield gr.skip(), "Comparing ...", *others
        with show_errors():
            yield self._draw_page(1)

    @show_errors()
    def _turn_page(self, page: object) -> Any:
        return self._draw_page(page)

    def _draw_page(self, page: object) -> tuple[Any, ...]:
        atlas = self._get_atlas()
        pages, groups = atlas.count_pages(), atlas.list_groups(page)
        drawn: list[Any] = []
        for number, group in groups:
            label = f"Group {number}: {len(group)} images"
            drawn.append(gr.update(value=atlas.draw_group(group), label=label, visible=True))
        empty = [gr.update(value=None, visible=False)] * (NUM_GROUPS - len(groups))
        slider = gr.update(maximum=max(2, pages), value=page, label=f"Page, of {pages}", visible=pages > 1)
        look, rest = gr.update(visible=False), gr.update(visible=bool(groups))
        return look, atlas.describe_copies(), slider, rest, *drawn, *empty

    def _make_toggle(self, slot: int) -> Any:
        @show_errors()
        def toggle(page: object, event: gr.EventData) -> Any:
            atlas = self._get_atlas()
            atlas.toggle(page, slot, get_index(event))
            return atlas.describe_copies(), atlas.draw_group(atlas.list_groups(page)[slot][1])

        return toggle

    @show_errors()
    def _write_rest(self, name: object) -> str:
        return self._get_atlas().write_list(self.lists, name, self._get_atlas().list_rest())

    def _get_atlas(self) -> Atlas:
        if self.explorer.atlas is None:
            raise ValueError("The images are not indexed yet: press the button first.")
        return self.explorer.atlas
