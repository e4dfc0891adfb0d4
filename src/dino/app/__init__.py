"""The explorer: a page to look at what a model sees. `explorer` computes, `page` lays out, `guard` keeps the door."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dino.options.commands import AppOptions


def command(options: AppOptions) -> None:
    """Serve the explorer until Ctrl-C or SIGTERM. Its temporary files, uploads among them, end with it.

    Raises:
        ValueError: Gradio is not installed, no such model, data or embedding, or the address or port cannot be used.
    """
    from dino import errors

    with tempfile.TemporaryDirectory(prefix="dino-app-", ignore_cleanup_errors=True) as folder:
        folder = str(Path(folder).resolve())
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_RUN_HISTORY": "False"}  # read when Gradio is imported
        errors.import_optional("gradio", "the explorer needs Gradio", "app")
        from dino.app import page

        page.serve(options, folder)
