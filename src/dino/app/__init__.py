"""The explorer: a page on this machine, to look at what a model sees. `explorer` computes, `page` lays out."""

from __future__ import annotations

from dino.options.commands import AppOptions


def command(options: AppOptions) -> None:
    """Serve the explorer until Ctrl-C.

    Raises:
        ValueError: Gradio is not installed, no such model, data or embedding, or the port is taken.
    """
    from dino import errors

    errors.import_optional("gradio", "the explorer needs Gradio", "app")
    from dino.app import page

    page.serve(options)
