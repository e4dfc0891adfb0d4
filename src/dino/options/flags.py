"""Options from the flags of a command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tyro

from dino.options import AnyOptions
from dino.options.rules import CHECKED


def parse_flags(
    kind: type[AnyOptions], arguments: Sequence[str], prog: str, default: AnyOptions | None = None
) -> AnyOptions:
    """The options that `arguments` give; the others as in `default`. `prog` begins the usage line.

    Raises:
        SystemExit: a flag does not exist or its value cannot be read, or help was asked for; the parser has said so.
        ValueError: a value breaks its rule. The check waits for the parser, which would put a frame around the sentence.
    """
    given: dict[str, Any] = {} if default is None else {"default": default}
    token = CHECKED.set(False)
    try:
        options = tyro.cli(kind, args=arguments, prog=prog, **given)
    finally:
        CHECKED.reset(token)
    options.check()
    return options
