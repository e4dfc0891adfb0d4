"""The explorer's page: layout, what happens on a click, and the command that serves it.

Gradio passes on what a request says: any JSON value, not only what the page would send. So sliders are read raw
(`preprocess=False`) and `Explorer` checks all numbers; `guard` has made sure that files lie in the server's own folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import webbrowser
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio import themes

from dino import files, weights
from dino.app.atlas_page import ONE_AT_A_TIME, PLAIN, QUIET, RAW, AtlasTabs, get_index, show_errors
from dino.app.explorer import Explorer, ShownImage, draw_alike, find_newest_run
from dino.app.guard import LARGEST_UPLOAD, LOOPBACK, Guard, find_host, listen
from dino.data.specs import find_path
from dino.html import render
from dino.models import NO_ATTENTION
from dino.options import toml
from dino.options.commands import AppOptions
from dino.weights.runs import find_run

MOST_SESSIONS = 16  # browser tabs whose images are kept; the one not used for longest loses them
MOST_WAITING = 32  # clicks that wait for the model
CSS = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
ABOUT = """# dino · {name}
What this model learned to see, without a single label. Drop an image, or pick one."""
LOOKS = """Where the model looks to describe the whole image. Every **head** looks for itself; black is where it looks least,
and bright where it looks most: so much of all its attention goes to a patch."""
MASKS = """The part of the image that holds this share of a head's attention; the rest is dimmed. Nobody taught it what an
object is."""
ALIKE = """**Click a patch** of the first image: bright are the patches, in both images, that the model thinks are like it. A
frame marks the one you clicked, and the most similar one of the second image. On the right, what is alike has the same
color (PCA)."""
NEAREST = """The images that the model thinks are most like yours, with their cosine similarity: 1 is the same."""
TIME = """The same image as teachers on the way of the run see it: attention (mean of all heads), and features of patches as
colors. Train with `--log.keep-teachers 10` to see the whole way; else a run keeps its last two checkpoints only."""
NOTHING = "There are no images to search: start the explorer with `--data FOLDER` or `--embedding FILE`."


class Page:
    """Components and their events. The images of a visitor are the states `first` and `second`, each a `ShownImage`."""

    def __init__(self, explorer: Explorer, name: str, lists: Path = Path("lists")):
        self.explorer, self.all = explorer, AtlasTabs(explorer, lists)
        with gr.Blocks(analytics_enabled=False, title=f"dino · {name}", delete_cache=(60, 3600)) as self.blocks:
            gr.Markdown(ABOUT.format(name=name))
            self.first, self.second = gr.State(), gr.State()
            self.all.add_script()
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
                    with gr.Tab("Map", elem_id="atlas"):
                        self.all.add_map()
                    with gr.Tab("Near-copies", elem_id="copies"):
                        self.all.add_copies()
                    with gr.Tab("Over time", elem_id="time"):
                        gr.Markdown(TIME)
                        self.go = gr.Button("Show", elem_id="go")
                        self.time = self._add_image("over", "")
            self._connect()
        self.blocks.queue(max_size=MOST_WAITING, api_open=False).state_session_capacity = MOST_SESSIONS
        for function in self.blocks.fns.values():
            function.api_visibility = "private"  # nothing is offered to other programs

    # --- components --------------------------------------------------------------------------------------------------

    def _add_chooser(self, label: str, name: str, columns: int) -> tuple[Any, Any]:
        file = gr.File(label=label, height=160, elem_id=f"{name}-file")
        pictures: Any = self.explorer.thumbnails
        shape: Any = {"columns": columns, "height": 300, "object_fit": "cover", "allow_preview": False}
        return file, gr.Gallery(pictures, visible=bool(pictures), elem_id=f"{name}-picks", **shape, **PLAIN)

    def _add_gallery(self, name: str, columns: int = 4, visible: bool = True, small: bool = False) -> Any:
        look = ["tight", "small"] if small else ["tight"]
        shape: Any = {"columns": columns, "object_fit": "contain", "elem_classes": look}
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
        self.found = self._add_gallery("found", 5, small=True)

    # --- events ------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        size, both, open_offered = self.size, [self.first, self.second], show_errors()(self.explorer.open_offered)
        if self.explorer.thumbnails:
            self._then_show_first(self.blocks.load(lambda size: open_offered(0, size), size, self.first, **RAW))
        for place, file, picks, then_show in (
            (self.first, self.file, self.picks, self._then_show_first),
            (self.second, self.other_file, self.other_picks, self._then_show_second),
        ):
            uploaded = file.upload(self._open_upload, [file, size], place, **RAW)
            uploaded.failure(lambda: None, None, file)
            then_show(uploaded)
            then_show(picks.select(self._open_pick, size, place, **RAW))
            then_show(size.release(self._resize, [place, size], place, **RAW))
        mass: Any = {"trigger_mode": "always_last"} | QUIET | RAW
        self.mass.input(self._draw_masks, [self.first, self.mass], self.masks, **mass)
        self.a.select(self._compare_to_first, both, [self.a, self.b], **QUIET)
        self.b.select(self._compare_to_second, both, [self.a, self.b], **QUIET)
        indexed = self.index.click(self._index_images, None, [self.index, self.progress], **ONE_AT_A_TIME)
        indexed.success(self._find_nearest, self.first, self.found)
        indexed.failure(lambda: (gr.update(interactive=True), ""), None, [self.index, self.progress])
        self.go.click(self._draw_teachers, self.first, self.time)
        self.all.connect(self.blocks)
        for event in self.all.indexed:
            done = event.success(lambda: gr.update(visible=False), None, self.index, **QUIET)
            done.success(self._find_nearest, self.first, self.found, **QUIET)

    def _then_show_first(self, event: Any) -> None:
        pictures = [self.heads, self.masks, self.a, self.pca]
        done = event.success(self._draw_first, [self.first, self.mass], pictures, **RAW)
        done.success(self._find_nearest, self.first, self.found)

    def _then_show_second(self, event: Any) -> None:
        event.success(lambda shown: None if shown is None else shown.enlarge(), self.second, self.b)

    @show_errors()
    def _open_upload(self, file: dict[str, Any] | None, size: int) -> ShownImage:
        """The file is read once, and deleted."""
        uploads, path = self.blocks.upload_file_set, (file or {}).get("path", "")
        if path not in uploads:
            raise ValueError("Choose a file first.")
        uploads.discard(path)
        try:
            return self.explorer.open_file(Path(path), size)
        finally:
            Path(path).unlink(missing_ok=True)

    @show_errors()
    def _open_pick(self, size: int, event: gr.EventData) -> ShownImage:
        return self.explorer.open_offered(get_index(event), size)

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
    def _compare_to_first(self, first: ShownImage | None, second: ShownImage | None, event: gr.EventData) -> Any:
        return (None, None) if first is None else draw_alike(first, second, get_index(event))

    @show_errors()
    def _compare_to_second(self, first: ShownImage | None, second: ShownImage | None, event: gr.EventData) -> Any:
        if second is None:
            return gr.skip(), gr.skip()
        b, a = draw_alike(second, first, get_index(event))
        return a, b

    def _index_images(self) -> Any:
        """Progress; at the end the button is gone."""
        with show_errors():
            for done, total in self.explorer.index_images(files.cache_folder() / "embeddings"):
                yield gr.update(interactive=False), f"Indexing: {done:,} of {total:,} images ..."
        yield gr.update(visible=False), "The images are indexed."

    @show_errors()
    def _draw_teachers(self, shown: ShownImage | None) -> Any:
        if shown is None:
            raise ValueError("Choose an image first.")
        return self.explorer.draw_teachers(shown)


def serve(options: AppOptions, folder: str) -> None:
    """Serve the page until Ctrl-C or SIGTERM; `folder` is for Gradio's files, which are those it may serve."""
    name = options.model or find_newest_run()
    host = find_host(options.share_with)
    with listen(host, options.port) as listening:
        model = weights.take(name, options.device)
        run = find_run(name)
        explorer = Explorer(model, run, options.data or find_data(run), options.embedding)
        page = Page(explorer, Path(name).name, Path(options.lists))
        app = gr.mount_gradio_app(
            FastAPI(),
            page.blocks,
            "/",
            theme=themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            css=CSS,
            max_file_size=LARGEST_UPLOAD,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
        )
        page.blocks.has_launched = True  # only then Gradio checks that the files of a request lie in its folder
        guard = Guard(app, folder, host, listening)
        quiet: Any = {"log_level": "critical", "ws": "none", "timeout_graceful_shutdown": 1}
        server = uvicorn.Server(uvicorn.Config(guard, **quiet))
        work = threading.Thread(target=server.run, args=([listening],), daemon=True)
        work.start()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing is left behind
        where = "of this machine" if host in LOOPBACK else "(whoever has it can use the page)"
        with contextlib.suppress(KeyboardInterrupt):
            print(f"Exploring {name}: open this address in a browser {where}. Ctrl-C ends it.", flush=True)
            print(guard.address, flush=True)
            if options.browser and has_display():
                open_browser(guard.address, Path(folder))
            while work.is_alive():
                time.sleep(1)  # an interrupted join() would call the thread ended
        server.should_exit = True
        work.join(5)


def has_display() -> bool:
    """Whether a browser that opens here is before the eyes of who started the command."""
    windows = sys.platform in ("darwin", "win32") or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    return windows and not any(map(os.environ.get, ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")))


def open_browser(address: str, folder: Path) -> None:
    """By a file in `folder`, which only this user can read: other users see the words of a command, and so the token."""
    page = folder / "open.html"
    page.write_text(render("open", address=address), encoding="utf-8")
    threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True).start()  # some wait for the browser


def find_data(run: Path | None) -> str | None:
    """What a run was trained on, if it is still there."""
    with contextlib.suppress(ValueError, TypeError):
        if run is not None:
            data = toml.read_toml(run / "config.toml").data.path
            path = find_path(data)
            return data if path is None or path.exists() else None
    return None
