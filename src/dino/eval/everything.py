"""`dino eval all`: every evaluation that a folder allows, and one table of their figures beside what they have to beat."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from dino import distributed, errors, weights
from dino.data.open import open_labeled
from dino.data.specs import find_path, split_folders
from dino.eval import davis
from dino.eval.copydetect import BLOCKS
from dino.eval.evaluate import advise_report, keep_result, locate_result, measure_for_command, write_result
from dino.eval.retrieval import find_ground_truth
from dino.models import NO_ATTENTION, Backbone
from dino.options.evaluate import EVALUATIONS, AllOptions, EvalOptions
from dino.terminal import say

CLASSIFIED = ("knn", "linear", "lowshot", "retrieval")  # what class folders allow


def choose(options: AllOptions, model: Backbone) -> dict[str, dict[str, Any] | str]:
    """The data options of each evaluation, or why it is left out."""
    path = find_path(options.data)
    root = path if path is not None and path.is_dir() else Path(os.devnull)  # below which there is nothing
    train, val = split_folders(options.data, options.val)
    voc, pairs = (root / "JPEGImages").is_dir(), (root / "images").is_dir() and (root / "masks").is_dir()
    copies, copydays = (root / "copies").is_dir(), any((root / block).is_dir() for block in BLOCKS)
    originals = next((root / name for name in ("originals", "original") if (root / name).is_dir()), None)
    data: dict[str, Any] = {"data": options.data}
    chosen: dict[str, dict[str, Any] | str] = {
        "finetune": "it trains the whole model, which takes long: dino eval finetune",
        "copydetect": "there are no folders originals/ and copies/, and no original/ with copies as Copydays has",
        "masks": "there are no folders images/ and masks/, and no JPEGImages/ as VOC has",
        "davis": f"there is no {davis.LIST}, as DAVIS has",
    }
    chosen["segment"] = chosen["masks"]
    if pairs or ((root / "ImageSets" / "Segmentation").is_dir() and voc):
        given = {"images": str(root / "images"), "masks": str(root / "masks")} if pairs else data
        chosen |= {"masks": given if model.has_attention else NO_ATTENTION.rstrip("."), "segment": given}
        if not pairs and not (root / "SegmentationClass").is_dir():
            chosen["segment"] = "there is no SegmentationClass/"
    if (root / davis.LIST).is_file():
        chosen["davis"] = data
        if locate_result(EVALUATIONS["davis"][1](model=options.model, **data), "davis") is None:
            chosen["davis"] = "there is no run to write masks to: dino eval davis --out FOLDER"
    if originals is not None and copies:
        others = {"distractors": str(root / "distractors")} if (root / "distractors").is_dir() else {}
        chosen["copydetect"] = {"originals": str(originals), "copies": str(root / "copies")} | others
    elif originals is not None and copydays:
        chosen["copydetect"] = data
    special = voc or pairs or copies or copydays or any(not isinstance(each, str) for each in chosen.values())
    chosen |= dict.fromkeys(CLASSIFIED, find_classes(train, val, special and val is None))
    if find_ground_truth(options.data) is not None:
        chosen["retrieval"] = data
    return {name: chosen[name] for name in EVALUATIONS}


def find_classes(train: str, val: str | None, special: bool) -> dict[str, Any] | str:
    """The data options of evaluations of class folders, or why there are none.

    Args:
        special: the folder holds something else, whose folders are no classes.
    """
    if special:
        return "there are no folders train/ and test/ of classes beside the others"
    try:
        open_labeled(train, val)
    except ValueError as error:
        return f"there are no class folders ({errors.find_reason(error).rstrip('.')})"
    return {"data": train} | ({} if val is None else {"val": val})


def evaluate_all(options: AllOptions) -> int:
    """Run what can be run; print the table. Returns 1 if an evaluation failed, which ends only that one.

    Raises:
        ValueError: the data allow none.
    """
    device = distributed.start(options.device)
    try:
        read = weights.read(options.model, only_backbone=True)
        model = weights.build_backbone(read).to(device)
        chosen = choose(options, model)
        left_out = {name: why for name, why in chosen.items() if isinstance(why, str)}
        if len(left_out) == len(chosen):
            raise ValueError(
                f"--data {options.data} allows no evaluation: {left_out['knn']}; see dino eval all --help."
            )
        results: dict[str, dict[str, Any]] = {}
        failed: dict[str, str] = {}
        for name, given in chosen.items():
            if isinstance(given, str):
                continue
            say(f"{name} ...")
            try:
                wanted: EvalOptions = EVALUATIONS[name][1](model=options.model, **given)
                results[name] = measure_for_command(name, model, wanted)[1]
                if distributed.is_main():
                    for line in keep_result(name, wanted, results[name], read.step):
                        say(line)
            except Exception as error:  # whatever it is, the others go on
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                failed[name] = kind + errors.first_line(error)
                say(f"{name} failed: {failed[name]}")
        if distributed.is_main():
            lines = [f"Left out: {name}: {why}." for name, why in left_out.items()]
            lines += [f"Failed: {name}: {why}." for name, why in failed.items()]
            print(format_figures(results), *lines, *advise_report(options.model), sep="\n")
            if options.json is not None:
                found = {"results": results, "left_out": left_out, "failed": failed}
                write_result(Path(options.json).expanduser(), found)
    finally:
        distributed.stop()
    return int(bool(failed))


def format_figures(results: dict[str, dict[str, Any]]) -> str:
    """A line for each figure of each evaluation, with the highest of its floors."""
    rows = [("", "", "here", "to beat")]
    for name, result in results.items():
        for number, (figure, value) in enumerate(result["figures"].items()):
            floors = result["floors"].get(figure, {})
            best = max(floors, key=floors.__getitem__, default=None)
            floor = "" if best is None else f"{floors[best]:6.2f}  {best}"
            rows.append((name if number == 0 else "", figure, f"{value:.2f}", floor))
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:<{first}}  {b:<{second}}  {c:>6}  {d}".rstrip() for a, b, c, d in rows)
