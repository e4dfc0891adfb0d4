"""The explorer's page: layout, what happens on a click, and the command that serves it to this machine alone."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from dino import distributed, files, weights
from dino.app.explorer import Explorer, ShownImage, draw_alike, find_newest_run
from dino.data.open import find_path
from dino.models import NO_ATTENTION
from dino.options import toml
from dino.options.commands import AppOptions

HOST = "127.0.0.1"
LARGEST_UPLOAD = "40mb"
CSS = """footer {display: none !important} .gradio-container {max-width: 1280px !important; margin: auto}
.tight .grid-wrap {min-height: 0 !important; height: auto !important; max-height: none !important}
.tight .thumbnail-item {aspect-ratio: auto !important; height: auto !important}"""
ABOUT = """# dino · {name}
What this model learned to see, without a single label. Drop an image, or pick one."""
LOOKS = """Where the model looks to describe the whole image. Every **head** looks for itself; bright is where it looks
most."""
MASKS = """The part of the image that holds this share of a head's attention; the rest is dimmed. Nobody taught it what an
object is."""
ALIKE = """**Click a patch** of the first image: bright are the patches, in both images, that the model thinks are like it. A
frame marks the one you clicked, and the most similar one of the second image. On the right, what is alike has the same
color (PCA)."""
NEAREST = """The images that the model thinks are most like yours, with their cosine similarity: 1 is the same."""
COPIES = """### Near-copies
Images that are all but the same: resized, recompressed, slightly cropped, or taken a moment later."""
TIME = """The same image through the checkpoints of the run: attention (mean of all heads), and features of patches as
colors. A run keeps its last two checkpoints; train with `--log.keep 20` to see more of its way."""
PLAIN: Any = {"show_label": False, "interactive": False, "buttons": []}  # of pictures
NOTHING = "There are no images to search: start the explorer with `--data FOLDER` or `--embedding FILE`."


@contextlib.contextmanager
def show_errors() -> Iterator[None]:
    """Around the work for a visitor: an error is one sentence on the page, and the page stays as it was."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise gr.Error(str(error), print_exception=False) from error


class Page:
    """Components and their events. The images of a visitor are the states `first` and `second`, each a `ShownImage`."""

    def __init__(self, explorer: Explorer, name: str):
        self.explorer = explorer
        with gr.Blocks(analytics_enabled=False, title=f"dino · {name}", delete_cache=(3600, 3600)) as self.blocks:
            gr.Markdown(ABOUT.format(name=name))
            self.first, self.second = gr.State(), gr.State()
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    self.file, self.picks = self._add_chooser("Drop an image here", "first", 2)
                    least, most, usual, step = explorer.sizes
                    self.size = gr.Slider(least, most, usual, step=step, label="Shorter side", elem_id="size")
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    with gr.Tab("Where it looks", elem_id="looks"):
                        self._add_attention()
                    with gr.Tab("What is alike", elem_id="alike"):
                        self._add_similarity()
                    with gr.Tab("Nearest images", elem_id="nearest"):
                        self._add_neighbors()
                    with gr.Tab("Over time", elem_id="time"):
                        gr.Markdown(TIME)
                        self.go = gr.Button("Show", elem_id="go")
                        self.time = self._add_image("over", "")
            self._connect()

    # --- components --------------------------------------------------------------------------------------------------

    def _add_chooser(self, label: str, name: str, columns: int) -> tuple[Any, Any]:
        file = gr.File(label=label, height=160, elem_id=f"{name}-file")
        pictures: Any = self.explorer.thumbnails
        shape: Any = {"columns": columns, "height": 300, "object_fit": "cover", "allow_preview": False}
        return file, gr.Gallery(pictures, visible=bool(pictures), elem_id=f"{name}-picks", **shape, **PLAIN)

    def _add_gallery(self, name: str, columns: int = 4, visible: bool = True) -> Any:
        shape: Any = {"columns": columns, "object_fit": "contain", "elem_classes": "tight"}
        return gr.Gallery(visible=visible, elem_id=name, **shape, **PLAIN)

    def _add_image(self, name: str, title: str) -> Any:
        with gr.Column(min_width=200):
            gr.Markdown(title)
            return gr.Image(elem_id=name, **PLAIN | {"buttons": ["fullscreen"]})

    def _add_attention(self) -> None:
        visible = self.explorer.model.has_attention
        gr.Markdown(LOOKS if visible else NO_ATTENTION[0].upper() + NO_ATTENTION[1:])
        self.heads = self._add_gallery("heads", visible=visible)
        gr.Markdown(MASKS, visible=visible)
        label = "Share of the attention"
        self.mass = gr.Slider(0.05, 0.95, 0.6, step=0.05, label=label, visible=visible, elem_id="mass")
        self.masks = self._add_gallery("masks", visible=visible)

    def _add_similarity(self) -> None:
        gr.Markdown(ALIKE)
        with gr.Row():
            self.a = self._add_image("a", "**Click a patch**")
            self.b = self._add_image("b", "Second image")
            self.pca = self._add_image("pca", "Features as colors")
        with gr.Accordion("Choose a second image", open=False):
            self.other_file, self.other_picks = self._add_chooser("Drop a second image here", "second", 6)

    def _add_neighbors(self) -> None:
        gr.Markdown(NEAREST)
        total = 0 if self.explorer.source is None else len(self.explorer.source)
        wanted = self.explorer.neighbors is None and total > 0
        self.index = gr.Button(f"Index the {total:,} images", variant="primary", visible=wanted, elem_id="index")
        self.progress = gr.Markdown("" if total else NOTHING, elem_id="progress")
        self.found = self._add_gallery("found", 5)
        gr.Markdown(COPIES, visible=total > 0)
        self.look = gr.Button("Look for near-copies", visible=total > 0, elem_id="look")
        self.said = gr.Markdown(elem_id="said")
        self.groups = self._add_gallery("groups", 6)

    # --- events ------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        size, both, open_image = self.size, [self.first, self.second], show_errors()(self.explorer.open_image)
        if self.explorer.thumbnails:
            self._then_show_first(self.blocks.load(lambda size: open_image(0, size), size, self.first))
        for place, file, picks, then_show in (
            (self.first, self.file, self.picks, self._then_show_first),
            (self.second, self.other_file, self.other_picks, self._then_show_second),
        ):
            uploaded = file.upload(open_image, [file, size], place)
            uploaded.failure(lambda: None, None, file)
            then_show(uploaded)
            then_show(picks.select(self._open_pick, size, place))
            then_show(size.release(self._resize, [place, size], place))
        quiet: Any = {"show_progress": "hidden"}
        self.mass.input(self._draw_masks, [self.first, self.mass], self.masks, trigger_mode="always_last", **quiet)
        self.a.select(self._compare_to_first, both, [self.a, self.b], **quiet)
        self.b.select(self._compare_to_second, both, [self.a, self.b], **quiet)
        indexed = self.index.click(self._index_images, None, [self.index, self.progress])
        indexed.success(self._find_nearest, self.first, self.found)
        indexed.failure(lambda: (gr.update(interactive=True), ""), None, [self.index, self.progress])
        self.look.click(show_errors()(self.explorer.find_copies), None, [self.said, self.groups])
        self.go.click(self._draw_checkpoints, [self.first, size], self.time)

    def _then_show_first(self, event: Any) -> None:
        pictures = [self.heads, self.masks, self.a, self.pca]
        done = event.success(self._draw_first, [self.first, self.mass], pictures)
        done.success(self._find_nearest, self.first, self.found)

    def _then_show_second(self, event: Any) -> None:
        event.success(lambda shown: None if shown is None else shown.enlarge(), self.second, self.b)

    @show_errors()
    def _open_pick(self, size: int, event: gr.SelectData) -> ShownImage:
        return self.explorer.open_image(event.index, size)

    @show_errors()
    def _resize(self, shown: ShownImage | None, size: int) -> ShownImage | None:
        return None if shown is None else self.explorer.show_pixels(shown.original, size)

    @show_errors()
    def _draw_first(self, shown: ShownImage | None, mass: float) -> tuple[Any, Any, Any, Any]:
        if shown is None:
            return None, None, None, None
        heads = None if shown.look is None else shown.draw_heads()
        return heads, self._draw_masks(shown, mass), shown.enlarge(), shown.enlarge(shown.colors)

    @show_errors()
    def _draw_masks(self, shown: ShownImage | None, mass: float) -> Any:
        return None if shown is None or shown.look is None else shown.draw_masks(mass)

    @show_errors()
    def _find_nearest(self, shown: ShownImage | None) -> Any:
        return None if shown is None or self.explorer.neighbors is None else self.explorer.find_nearest(shown, 10)

    @show_errors()
    def _compare_to_first(self, first: ShownImage | None, second: ShownImage | None, event: gr.SelectData) -> Any:
        return (None, None) if first is None else draw_alike(first, second, event.index)

    @show_errors()
    def _compare_to_second(self, first: ShownImage | None, second: ShownImage | None, event: gr.SelectData) -> Any:
        if second is None:
            return gr.skip(), gr.skip()
        b, a = draw_alike(second, first, event.index)
        return a, b

    def _index_images(self) -> Any:
        """Progress; at the end the button is gone."""
        with show_errors():
            for done, total in self.explorer.index_images(files.cache_folder() / "embeddings"):
                yield gr.update(interactive=False), f"Indexing: {done:,} of {total:,} images ..."
        yield gr.update(visible=False), "The images are indexed."

    @show_errors()
    def _draw_checkpoints(self, shown: ShownImage | None, size: int) -> Any:
        if shown is None:
            raise ValueError("Choose an image first.")
        return self.explorer.draw_checkpoints(shown, size)


def serve(options: AppOptions) -> None:
    """Serve the page to this machine until Ctrl-C."""
    name = options.model or find_newest_run()
    if options.port is not None:
        check_port(options.port)
    model = weights.load(name).to(distributed.start(options.device))
    run = Path(name) if Path(name).is_dir() else None
    page = Page(Explorer(model, run, options.data or find_data(run), options.embedding), Path(name).name)
    with contextlib.suppress(KeyboardInterrupt):
        _, address, _ = page.blocks.launch(
            server_name=HOST,
            server_port=options.port,
            share=False,
            quiet=True,
            theme=themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
            max_file_size=LARGEST_UPLOAD,
            prevent_thread_lock=True,
        )
        print(f"Exploring {name}: open {address} in a browser of this machine. Ctrl-C ends it.", flush=True)
        threading.Event().wait()
    page.blocks.close(verbose=False)


def check_port(port: int) -> None:
    """Refuse a port that is taken or not allowed."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ValueError(f"--port {port} is taken, or none that you may use; choose another.") from error


def find_data(run: Path | None) -> str | None:
    """What a run was trained on, if it is still there."""
    with contextlib.suppress(ValueError, TypeError):
        if run is not None:
            data = toml.read_recorded(str(run)).data.path
            path = find_path(data)
            return data if path is None or path.exists() else None
    return None
