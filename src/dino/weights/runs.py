"""The teachers that a run directory keeps, the best and the last, and which of them a name asks for.

`teacher.safetensors` holds the last, and says in its header which best belongs to it; `best.safetensors` holds that one. A
checkpoint is written before both, then the best, then the last. So the files of a run that was killed are either those of its
newest checkpoint, or the last is older; then the checkpoint, which holds both teachers too, stands in.

`teachers/` holds those on the way that the option `log.keep_teachers` asks for, each a file that `dino.load` takes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dino import errors, files
from dino.names import find_release
from dino.options import required
from dino.terminal import say
from dino.weights.checkpoints import get_step, list_checkpoints, read_newest
from dino.weights.formats import State

WEIGHTS, BEST, CONFIG = "teacher.safetensors", "best.safetensors", "config.json"
KEPT = "teachers/step-{:08d}.safetensors"

# Scores by which a teacher is the best of its run, and their form.
_SCORES = {
    "knn20_top1": ("20-NN on held-out images", "{:.1f} %"),
    "knn10_top1": ("10-NN on held-out images", "{:.1f} %"),
    "two_crop_retrieval": ("two-crop retrieval, which needs no labels", "{:.1f} %"),
}


class Best(NamedTuple):
    """Why a teacher is the best of its run.

    Args:
        step: of the training, after which it was measured.
        measure: the metric that was compared, and `score` its value.
        before: the same of the network before the first step, where it was measured.
    """

    step: int
    measure: str
    score: float
    before: float | None

    @property
    def why(self) -> str:
        """The end of a sentence."""
        name, form = _SCORES.get(self.measure, (self.measure, "{:.3g}"))
        text = f"the best by {name} ({form.format(self.score)})"
        if self.step and self.before is not None and self.score <= self.before:
            text += f", but no better than before training ({form.format(self.before)})"
        return text

    def describe(self, last: int) -> str:
        """Which teacher of a run of `last` steps is taken, and why: an object of a sentence."""
        if self.step == 0:
            return f"the weights that the run started from, {self.why}"
        if self.step == last:
            return f"the teacher of step {last:,}, the last and {self.why}"
        return f"the teacher of step {self.step:,} of {last:,}, {self.why}"


class Opened(NamedTuple):
    """What was read, of a run or of anything else."""

    where: Path
    content: Any  # tensors by name, or a whole checkpoint
    config: dict[str, Any]  # {}: in the checkpoint
    step: int | None = None  # of the training; None: unknown
    best: Best | None = None  # None: the last was asked for, or none was ever measured


# --- names ---------------------------------------------------------------------------------------------------------


def split_name(name: str | os.PathLike[str]) -> tuple[str, bool]:
    """The path in `name`, and whether it asks for the last teacher of a run: 'runs/a:last'. 'runs/a' is the best.

    A path that exists is taken whole, whatever characters are in it. So is a release, 'vits16:full' for example.

    Raises:
        ValueError: another word follows the name of a run.
    """
    text = os.fspath(name)
    path, _, word = text.rpartition(":")
    is_run = path and any((Path(path).expanduser() / file).is_file() for file in ("config.toml", WEIGHTS))
    if not is_run or os.path.exists(os.path.expanduser(text)):
        return text, False
    if word != "last" and find_release(text) is None:
        raise ValueError(f"a run has no '{word}' teacher; give {path} for the best, or {path}:last for the last.")
    return (path, True) if word == "last" else (text, False)


def find_run(name: str | os.PathLike[str]) -> Path | None:
    """The run directory of a model's `name`; None: it is no run."""
    path = Path(split_name(name)[0]).expanduser()
    return path if (path / "config.toml").is_file() else None


def make_absolute(name: str) -> str:
    """A model's `name` so that it holds in another working directory."""
    path, last = split_name(name)
    return files.absolute_if_exists(path) + ":last" * last


# --- writing -------------------------------------------------------------------------------------------------------


def save(folder: Path, backbone: nn.Module, arguments: dict[str, Any], step: int = 0, best: Best | None = None) -> None:
    """Write `backbone` after `step` steps to `folder` as safetensors beside the arguments of `create` that rebuild it.

    Args:
        best: the run's best so far, which `save_best` has written.
    """
    files.write(folder / CONFIG, json.dumps({"model": arguments}, indent=2) + "\n")
    _write(folder / WEIGHTS, backbone.state_dict(), {"step": step, "best": best and best._asdict()})


def save_best(folder: Path, state: State, best: Best) -> None:
    """Write the best backbone of a run, before the last."""
    _write(folder / BEST, state, {"step": best.step})


def save_on_the_way(folder: Path, backbone: nn.Module, arguments: dict[str, Any], step: int) -> None:
    """Write `backbone` after `step` steps beside the others on the way, with the arguments of `create` in its header."""
    (path := folder / KEPT.format(step)).parent.mkdir(exist_ok=True)
    _write_tensors(path, _copy(backbone.state_dict()), "model", arguments)


def list_on_the_way(folder: Path) -> list[Path]:
    """The teachers that a run keeps of its way, the oldest first."""
    return sorted(folder.glob("teachers/step-????????.safetensors"))


def _write(path: Path, state: State, header: dict[str, Any]) -> None:
    state = _copy(state)
    _write_tensors(path, state, "dino", header | {"sha256": hash_state(state)})


def _copy(state: State) -> State:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _write_tensors(path: Path, state: State, name: str, content: dict[str, Any]) -> None:
    """A whole file. Its header has one entry, because the order of several would differ from file to file."""
    with files.replacing(path, flush=True) as temporary:
        save_file(state, temporary, {name: json.dumps(content)})


def hash_state(state: State) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- reading -------------------------------------------------------------------------------------------------------


def open_run(run: Path, last: bool, only_backbone: bool) -> Opened:
    """A teacher of the directory `run`, or its newest checkpoint where more than a backbone is wanted.

    The checkpoint also stands in for a file that is missing, damaged, or of another step.
    """
    checkpoints, file = list_checkpoints(run / "checkpoints"), run / WEIGHTS
    reason = ""
    if only_backbone or not checkpoints:
        try:
            header = _read_header(file)
            if checkpoints and header.get("step", float("inf")) < (newest := get_step(checkpoints[-1])):
                raise ValueError(f"it is of step {header['step']} and not of step {newest}")
            best = Best(**header["best"]) if header.get("best") and not last else None
            if best is not None and (checkpoints or (run / BEST).exists()):  # else the last was copied alone
                file = run / BEST
                if (step := _read_header(file)["step"]) != best.step:
                    raise ValueError(f"it is of step {step} and not of step {best.step}")
            model = json.loads((run / CONFIG).read_text())["model"]
            return Opened(run, _read_checked(file), {"model": model}, best.step if best else header.get("step"), best)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            if not checkpoints:
                raise
            reason = errors.find_reason(error)
    found = required(read_newest(run / "checkpoints"))
    if reason:
        say(f"{file} cannot be used ({reason}); taking {found.path.name}. `dino train --resume {run}` writes it anew.")
    state, kept = found.state, found.state.get("best", {})
    if kept.get("weights") and not last:
        best = Best(**kept["found"])
        if only_backbone:
            state["method"] = {f"teacher.backbone.{name}": value for name, value in kept["weights"].items()}
            return Opened(found.path, state, {}, best.step, best)
        if best.step != state["step"]:
            say(
                f"{run} has only the backbone of its best teacher (step {best.step}); taking all of step {state['step']}."
            )
    return Opened(found.path, state, {}, state["step"])


def _read_header(file: Path) -> dict[str, Any]:
    """What we have written beside the tensors; {} in files of before."""
    with safe_open(file, "pt") as opened:
        return json.loads((opened.metadata() or {}).get("dino", "{}"))


def _read_checked(file: Path) -> State:
    """The tensors of a file, whose checksum must be right."""
    state, written = load_file(file), _read_header(file).get("sha256")
    if written is not None and written != hash_state(state):
        raise ValueError(f"{file} is damaged: its checksum is another than when it was written.")
    return state
