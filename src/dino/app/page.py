"""The explorer's page: layout, what happens on a click, and the command that serves it to this machine alone."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from dino import distributed, files, weights
from dino.app.explorer import Explorer, Shown, find_newest_run
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
NOTHING = "There are no images to search: start the explorer with `--data FOLDER` or `--embedding FILE`."


def show_errors(work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` of a visitor; what it refuses is one sentence on the page, and the page stays as it was."""

    @functools.wraps(work)
    def tried(*arguments: Any) -> Any:
        try:
            return work(*arguments)
        except (ValueError, OSError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    return tried


class Page:
    """Components and their events. A visitor's images lie in `first` and `second`, each a `Shown`."""

    def __init__(self, explorer: Explorer, name: str):
        self.explorer = explorer
        with gr.Blocks(analytics_enabled=False, title=f"dino · {name}", delete_cache=(3600, 3600)) as self.blocks:
            gr.Markdown(ABOUT.format(name=name))
            self.first, self.second = gr.State(), gr.State()
            with gr.Row():
                with gr.Column(scale=1, min_width=260):
                    self.file, self.picks = self._chooser("Drop an image here", "first", 2)
                    least, most, usual, step = explorer.sizes
                    self.size = gr.Slider(least, most, usual, step=step, label="Shorter side", elem_id="size")
                with gr.Column(scale=3, min_width=320), gr.Tabs():
                    with gr.Tab("Where it looks", elem_id="looks"):
                        self._looks()
                    with gr.Tab("What is alike", elem_id="alike"):
                        self._alike()
                    with gr.Tab("Nearest images", elem_id="nearest"):
                        self._nearest()
                    with gr.Tab("Over time", elem_id="time"):
                        self._over_time()
            self._events()

    def _chooser(self, label: str, name: str, columns: int) -> tuple[Any, Any]:
        offered = self.explorer.offered
        file = gr.File(label=label, height=160, elem_id=f"{name}-file")
        picks = gr.Gallery(
            offered,
            show_label=False,
            columns=columns,
            height=300,
            allow_preview=False,
            object_fit="cover",
            visible=bool(offered),
            interactive=False,
            buttons=[],
            elem_id=f"{name}-picks",
        )
        return file, picks

    def _gallery(self, name: str, columns: int = 4, visible: bool = True) -> Any:
        return gr.Gallery(
            columns=columns,
            show_label=False,
            object_fit="contain",
            interactive=False,
            buttons=[],
            visible=visible,
            elem_id=name,
            elem_classes="tight",
        )

    def _image(self, name: str, title: str) -> Any:
        with gr.Column(min_width=200):
            gr.Markdown(title)
            return gr.Image(show_label=False, interactive=False, buttons=["fullscreen"], elem_id=name)

    def _looks(self) -> None:
        sees = self.explorer.sees
        gr.Markdown(LOOKS if sees else NO_ATTENTION[0].upper() + NO_ATTENTION[1:])
        self.heads = self._gallery("heads", visible=sees)
        gr.Markdown(MASKS, visible=sees)
        self.mass = gr.Slider(0.05, 0.95, 0.6, step=0.05, label="Share of the attention", visible=sees, elem_id="mass")
        self.masks = self._gallery("masks", visible=sees)

    def _alike(self) -> None:
        gr.Markdown(ALIKE)
        with gr.Row():
            self.a = self._image("a", "**Click a patch**")
            self.b = self._image("b", "Second image")
            self.pca = self._image("pca", "Features as colors")
        with gr.Accordion("Choose a second image", open=False):
            self.other_file, self.other_picks = self._chooser("Drop a second image here", "second", 6)

    def _nearest(self) -> None:
        explorer = self.explorer
        gr.Markdown(NEAREST)
        total = 0 if explorer.source is None else len(explorer.source)
        wanted = explorer.neighbors is None and total > 0
        self.index = gr.Button(f"Index the {total:,} images", variant="primary", visible=wanted, elem_id="index")
        self.progress = gr.Markdown("" if total else NOTHING, elem_id="progress")
        self.found = self._gallery("found", 5)
        gr.Markdown(COPIES, visible=total > 0)
        self.look = gr.Button("Look for near-copies", visible=total > 0, elem_id="look")
        self.said = gr.Markdown(elem_id="said")
        self.groups = self._gallery("groups", 6)

    def _over_time(self) -> None:
        gr.Markdown(TIME)
        self.go = gr.Button("Show", elem_id="go")
        self.time = self._image("over", "")

    # --- events ------------------------------------------------------------------------------------------------------

    def _events(self) -> None:
        e, size = self.explorer, self.size
        if e.offered:
            self._show_first(self.blocks.load(show_errors(lambda size: e.open(0, size)), size, self.first))
        for place, file, picks, show in (
            (self.first, self.file, self.picks, self._show_first),
            (self.second, self.other_file, self.other_picks, self._show_second),
        ):
            uploaded = file.upload(show_errors(e.open), [file, size], place)
            uploaded.failure(lambda: None, None, file)
            show(uploaded)
            show(picks.select(show_errors(self._pick), size, place))
            show(size.release(show_errors(self._resize), [place, size], place))
        self.mass.input(
            show_errors(lambda shown, mass: None if shown is None else e.masks(shown, mass)),
            [self.first, self.mass],
            self.masks,
            show_progress="hidden",
            trigger_mode="always_last",
        )
        both = [self.first, self.second]
        self.a.select(show_errors(self._alike_to), both, [self.a, self.b], show_progress="hidden")
        self.b.select(show_errors(self._alike_to_second), both, [self.a, self.b], show_progress="hidden")
        indexed = self.index.click(self._index, None, [self.index, self.progress])
        indexed.success(show_errors(self._nearest_of), self.first, self.found)
        self.look.click(show_errors(e.copies), None, [self.said, self.groups])
        self.go.click(show_errors(self._through_time), [self.first, size], self.time)

    def _show_first(self, event: Any) -> None:
        pictures = [self.heads, self.masks, self.a, self.pca]
        done = event.success(show_errors(self._pictures), [self.first, self.mass], pictures)
        done.success(show_errors(self._nearest_of), self.first, self.found)

    def _show_second(self, event: Any) -> None:
        event.success(lambda shown: None if shown is None else shown.zoomed(), self.second, self.b)

    def _resize(self, shown: Shown | None, size: int) -> Shown | None:
        return None if shown is None else self.explorer.resize(shown.original, size)

    def _pick(self, size: int, event: gr.SelectData) -> Shown:
        return self.explorer.open(event.index, size)

    def _pictures(self, shown: Shown | None, mass: float) -> tuple[Any, Any, Any, Any]:
        e = self.explorer
        if shown is None:
            return None, None, None, None
        heads, masks = (e.heads(shown), e.masks(shown, mass)) if e.sees else (None, None)
        return heads, masks, shown.zoomed(), e.colors(shown)

    def _nearest_of(self, shown: Shown | None) -> Any:
        return None if shown is None or self.explorer.neighbors is None else self.explorer.nearest(shown, 10)

    def _alike_to(self, first: Shown | None, second: Shown | None, event: gr.SelectData) -> tuple[Any, Any]:
        return (None, None) if first is None else self.explorer.alike(first, second, event.index)

    def _alike_to_second(self, first: Shown | None, second: Shown | None, event: gr.SelectData) -> tuple[Any, Any]:
        if second is None:
            return gr.skip(), gr.skip()
        b, a = self.explorer.alike(second, first, event.index)
        return a, b

    def _index(self) -> Any:
        """Progress, and at the end the button is gone."""
        try:
            for done, total in self.explorer.index(files.cache_folder() / "embeddings"):
                yield gr.update(interactive=False), f"Indexing: {done:,} of {total:,} images ..."
        except (ValueError, OSError) as error:
            yield gr.update(interactive=True), ""
            raise gr.Error(str(error), print_exception=False) from error
        yield gr.update(visible=False), "The images are indexed."

    def _through_time(self, shown: Shown | None, size: int) -> Any:
        if shown is None:
            raise ValueError("Choose an image first.")
        return self.explorer.over_time(shown, size)


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
    """Refuse a port that cannot be had."""
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
