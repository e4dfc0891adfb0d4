"""Names of timm's architectures with arguments: "vit_small_patch14_dinov2(depth=4)". timm itself is slow to import."""

from __future__ import annotations

import ast
from typing import Any


def name_architecture(name: str, arguments: dict[str, Any]) -> str:
    """The name with arguments of timm's class that differ from its own."""
    return name + (f"({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" if arguments else "")


def split_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """The inverse of `name_architecture`.

    Raises:
        ValueError: what stands in the brackets are no arguments.
    """
    name, bracket, rest = name.partition("(")
    if not bracket:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        return name, {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AssertionError) as error:
        raise ValueError(f"timm:{name}({rest} is no architecture; write arguments as timm:{name}(depth=4).") from error


def choose_pooling(name: str) -> dict[str, Any]:
    """DINOv3's feature is that of its authors, [CLS], where timm by itself takes the mean of the patches."""
    return {"global_pool": "token"} if name.startswith("vit_") and "_dinov3" in name else {}
