"""The command line as people use and misuse it: one clear sentence, exit code 2, nothing half-written."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dino
import processes
from dino import cli, names, run
from dino.engine.build import Plan, build_method
from dino.options import auto, completion, flatten, help, replace, toml
from dino.options.recipes import RECIPES, find_recipe
from dino.options.train import TrainOptions
from helpers import TINY, dino_command, draw_images, run_dino, tiny_flags


def test_help_is_quick_and_loads_no_torch():
    started = time.monotonic()
    done = run_dino("--help", real=True)
    seconds = time.monotonic() - started
    assert done.returncode == 0
    assert "dino train --data photos/" in done.stdout
    assert seconds < 2  # half a second on an idle machine; see benchmarks
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, dino.cli; dino.cli.main(['--help']); print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert loaded.stdout.splitlines()[-1] == "False"


def read_help(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([*words])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_explains_itself(command, capsys, monkeypatch):
    """A sentence, two examples, and every option with a text; nothing is wider than the terminal, and nothing is lost."""
    monkeypatch.setenv("COLUMNS", "80")
    said = read_help(capsys, *command.split(), "--help")
    assert read_help(capsys, "help", *command.split()) == said
    sentence, examples = said.split("\n\n")[:2]
    assert re.match(r"[A-Z].*\.$", sentence, re.DOTALL)
    assert len(examples.splitlines()) >= 2
    assert all(line.startswith(f"  dino {command}") for line in examples.splitlines())
    assert "None" not in said
    assert not re.search(r"\b(STR|INT|FLOAT)\b", said)
    lines = [line for line in said.splitlines() if not line.startswith("  dino ")]
    assert max(map(len, lines)) <= 80
    flat, flags = " ".join(said.split()), help.list_flags(cli.COMMANDS[command].options)
    for flag in flags:
        assert flag.text, flag.name
        assert f" {', '.join(flag.spellings)} {flag.values * (not flag.by_place)}".rstrip() in flat
        assert " ".join(flag.text.replace("None: ", "Default: ").split()) in flat
    assert {*cli.COMMANDS[command].options.common} <= {flag.name for flag in flags}


def test_common_options_come_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = read_help(capsys, "train", "--help")
    assert said.index("--no-report") > said.index("more options:")
    assert said.index("--data.val") > said.index("options data.*: Images and their labels.")
    common = said[said.index("common options:") : said.index("more options:")]
    found = re.findall(r"^  (--[a-z]+)", common, re.MULTILINE)
    assert found[:7] == ["--data", "--out", "--epochs", "--minutes", "--hours", "--model", "--init"]
    assert said[: said.index("--data,")].count("\n") < 15
    assert "usage: dino attention MODEL IMAGES... [OPTIONS]" in read_help(capsys, "attention", "-h")
    assert "MODEL --data IMAGES [OPTIONS]" in read_help(capsys, "eval", "knn", "-h")
    assert "Here: 800." in " ".join(read_help(capsys, "train", "vit_small_800ep", "-h").split())


def test_help_fits_any_terminal(capsys, monkeypatch):
    for columns, widest in ((20, 40), (60, 60), (500, 100)):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = read_help(capsys, "train", "--help").splitlines()
        assert widest - 20 < max(len(line) for line in lines if not line.startswith("  dino ")) <= widest


def test_a_group_of_commands_lists_them(capsys):
    for words in (["eval"], ["eval", "--help"], ["help", "eval"]):
        assert cli.main(words) == 0
        said = capsys.readouterr().out
        assert "eval knn " in said
        assert "train" not in said.split("eval finetune")[0]
    assert cli.main(["help", "nosuch"]) == 2
    assert cli.main(["help"]) == 0
    assert "figure tsne" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("knn eval m --data x", "eval knn m --data x"),
        ("knn m", "eval knn m"),
        ("runs/a eval knn", "eval knn runs/a"),
        ("eval runs/a knn", "eval knn runs/a"),
        ("--data x train", "train --data x"),
        ("demo train", "train demo"),
        ("figure attention runs/a x.jpg", "attention runs/a x.jpg"),
    ],
)
def test_words_in_another_order_are_put_right(words, meant, capsys):
    assert cli.main(words.split()) == 2
    assert capsys.readouterr().err == f"dino: the command comes first; write: dino {meant}\n"


def test_a_shell_completes_commands_options_and_choices(tmp_path):
    """By a real bash, which offers files itself where we offer nothing."""
    (tmp_path / "dino").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m dino "$@"\n')
    (tmp_path / "dino").chmod(0o755)
    cases = {"ev": "eval", "eval k": "knn", "help eval dav": "davis", "recipes vit_small_1": "vit_small_100ep"}
    cases |= {"train --dev": "--device", "train --device ": "auto cpu cuda mps", "train resnet18": "resnet18_cifar10"}
    cases |= {"submit --gpus 2 tr": "train", "submit train --mode": "--model", "eval knn phot": "", "train --out ": ""}
    ask = 'ask() { COMP_WORDS=(dino "$@"); COMP_CWORD=$#; _dino; echo "${COMPREPLY[*]}"; }'
    script = f'eval "$(dino completion bash)"; {ask}\n'
    script += "".join(f"ask {shlex.join(text.split(' '))}\n" for text in cases)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    found = done.stdout.splitlines()
    assert not done.stderr
    for text, offered in zip(cases, found, strict=True):
        assert offered.split()[: len(cases[text].split()) or None] == cases[text].split(), text
    assert "complete -c dino" in completion.SCRIPTS["fish"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval knn nosuch --data x", "there is no run, weight file or release 'nosuch'"),
        ("eval knn vits16 --data nosuch/", "The data path 'nosuch/' does not exist"),
        ("train --data nosuch/", "The data path 'nosuch/' does not exist"),
        ("train --init vits61", "there is no run, weight file or release 'vits61'"),
        ("report nosuch", "nosuch holds no run (no config.toml)"),
        ("doctor nosuch", "The data path 'nosuch' does not exist"),
        ("search nosuch a.jpg --k 5", "there is no embedding 'nosuch'; write one with: dino embed"),
        ("embed runs/a:last x --out y", "there is no run, weight file or release 'runs/a:last'"),
    ],
)
def test_what_is_not_there_is_refused_before_torch_is_imported(words, said, tmp_path):
    script = "import sys, dino.cli; print(dino.cli.main(sys.argv[1:]), 'torch' in sys.modules)"
    command = [sys.executable, "-c", script, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith(f"dino: {said}")


def test_every_name_that_may_be_a_model_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for name in ("vits16", "dino_vits16:full", "timm:x", "hf:a/b", "s3://b/runs/a", "a", "a:last", str(tmp_path)):
        names.require_model(name)
    with pytest.raises(ValueError, match="has no part 'x'"):
        names.require_model("vits16:x")


def broken_folder(path: Path) -> Path:
    path.mkdir()
    for i in range(20):
        (path / f"{i}.jpg").write_text("no image")
    return path


def small_images(path: Path) -> Path:
    path.mkdir()
    for i in range(40):
        Image.fromarray(np.full((5, 5, 3), i, np.uint8)).save(path / f"{i}.png")
    return path


BAD = {
    "missing folder": (["--data", "{tmp}/nowhere"], "nowhere"),
    "empty folder": (["--data", "{empty}"], "empty"),
    "file for a folder": (["--data", "{photos}/class0/000.jpg"], "000.jpg"),
    "no decodable image": (["--data", "{broken}"], "none of the 16 images tried can be read"),
    "batch larger than the data": (["--data", "{photos}", "--batch-size", "400"], "batch_size is 400"),
    "image smaller than a patch": (["--data", "{photos}", "--views.local-size", "4"], "smaller than one patch"),
    "size no multiple of the patch": (["--data", "{photos}", "--views.global-size", "36"], "views.global_size is 36"),
    "output that no one can write": (["--data", "{photos}", "--out", "/proc/run"], "cannot be written"),
    "unknown option": (["--data", "{photos}", "--optim.lrr", "1"], "--optim.lr"),
    "unknown recipe": (["cifar", "--data", "{photos}"], "Did you mean 'cifar10'?"),
    "folder as recipe": (["{photos}"], "dino train --data"),
    "images as recipe": (["{photos}/class0/000.jpg"], "photos/class0"),
    "wrong type": (["--data", "{photos}", "--epochs", "many"], "epochs is 'many'; it must be a number."),
    "negative": (["--data", "{photos}", "--optim.lr", "-1"], "cannot be negative"),
    "contradiction": (["--data", "{photos}", "--device", "cpu", "--precision", "fp16"], "needs a GPU"),
    "warm-up beyond the run": (["--data", "{photos}", "--optim.warmup-epochs", "9"], "only 3 epochs"),
    "heads do not divide": (["--data", "{photos}", "--model.num-heads", "5"], "not a multiple of num_heads"),
    "unknown architecture": (["--data", "{photos}", "--model.arch", "vit_smal"], "Did you mean 'vit_small'?"),
    "out is a file": (["--data", "{photos}", "--out", "{photos}/class0/000.jpg"], "is a file"),
    "out holds something else": (["--data", "{photos}", "--out", "{photos}"], "holds no run"),
    "resume of nothing": (["--resume", "{tmp}/nowhere"], "holds no run"),
    "missing options file": (["{tmp}/mine.toml"], "no options file"),
    "scenes of no number": (["--data", "scenes:many"], "scenes:NUMBER"),
    "seed out of range": (["--data", "{photos}", "--seed", "-1"], "seed"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_sentence_and_leaves_nothing(case, tmp_path, capsys, monkeypatch):
    flags, words = BAD[case]
    (tmp_path / "empty").mkdir()
    places = {
        "tmp": tmp_path,
        "photos": draw_images(tmp_path / "photos"),
        "empty": tmp_path / "empty",
        "broken": broken_folder(tmp_path / "broken"),
    }
    monkeypatch.chdir(tmp_path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    flags = [f.format(**places) for f in flags]
    given = {f for f in flags if f.startswith("--")}
    tiny = tiny_flags()
    rest = [t for i, t in enumerate(tiny) if t not in given and (i == 0 or tiny[i - 1] not in given)]
    out = [] if "--out" in given or "--resume" in given else ["--out", "run"]
    first = flags if not flags[0].startswith("--") else []
    options = [] if "--resume" in given else rest
    code = cli.main(["train", *first, *out, *options, *([] if first else flags)])
    said = capsys.readouterr().err
    assert code == 2, said
    last = said.splitlines()[-1]  # what came before it says how the images were found
    assert last.startswith("dino: ")
    assert words in last
    assert "(add --debug" not in said
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_an_existing_run_is_refused_unless_overwritten_or_resumed(photos, tmp_path):
    flags = ["--data", photos, "--out", tmp_path / "run", *tiny_flags(epochs=1)]
    assert run_dino("train", *flags).returncode == 0
    again = run_dino("train", *flags)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    assert "--overwrite" in again.stderr
    assert run_dino("train", *flags, "--overwrite").returncode == 0


def test_a_run_has_one_writer(photos, tmp_path):
    run = tmp_path / "run"
    command = dino_command("train", "--data", photos, "--out", run, *tiny_flags(epochs=2000))
    process = processes.start(command, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (run / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for flags in (["--resume", run], ["--data", photos, "--out", run, *tiny_flags(), "--overwrite"]):
            second = run_dino("train", *flags)
            assert second.returncode == 2
            assert "another process is writing" in second.stderr
            assert (run / "config.toml").exists()
        process.kill()
        process.wait()
        assert run_dino("train", "--resume", run, "--stop-after", 1).returncode == 0
    finally:
        process.kill()
        process.wait()


def test_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
    assert cli.main(["eval", "kn"]) == 2
    assert "Did you mean 'eval knn'?" in capsys.readouterr().err


def test_debug_shows_the_traceback():
    done = run_dino("train", "--data", "/nowhere/at/all", "--debug")
    assert "Traceback" in done.stderr


def test_toml_file_and_flags(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('epochs = 7\n[views]\nglobal_scale = [0.3, 1.0]\n[log]\nto = []\n[data]\npath = "x"\n')
    options = cli.parse_train([str(file), "--epochs", "9"])
    assert (options.epochs, options.views.global_scale, options.log.to) == (9, (0.3, 1.0), ())
    file.write_text("epochz = 7\n")
    with pytest.raises(ValueError, match=r"mine.toml: unknown options \['epochz'\].*Did you mean 'epochs'"):
        cli.parse_train([str(file)])
    file.write_text('[optim]\nname = "adam"\n')
    with pytest.raises(ValueError, match=r"mine.toml: optim.name is 'adam'; choose one of .*Did you mean 'adamw'"):
        cli.parse_train([str(file)])
    file.write_text("epochs = = 7\n")
    with pytest.raises(ValueError, match="not a valid TOML file"):
        cli.parse_train([str(file)])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_resolve_and_survive_a_round_trip(name, tmp_path):
    recipe = find_recipe(name)
    assert recipe.about
    assert recipe.command.startswith(("dino train", "torchrun"))
    assert recipe.expected
    for gpu in (False, True):
        options = auto.resolve(recipe.options, 50_000, 32 if "cifar10" in name else 400, gpu, 2)
        missing = {n for n, v in flatten(options).items() if v is None and n in RESOLVED}
        expected = set() if options.model.arch.startswith("vit_") else {"model.patch_size"}
        expected |= set() if options.head.prototypes or options.head.out_dim else {"head.out_dim"}
        assert missing == expected | ({"method.momentum"} if options.method.teacher != "momentum" else set())
        (tmp_path / "a.toml").write_text(as_toml(options))
        assert toml.read_toml(tmp_path / "a.toml") == options


# Backbone parameters of the reference's models, and the figures it publishes for them.
PUBLISHED = {
    "vit_small_100ep": (21_665_664, "69.3", "74.0"),
    "vit_small_300ep": (21_665_664, "73.3", "76.0"),
    "vit_small_800ep": (21_665_664, "74.5", "77.0"),
    "vit_small_p8": (21_670_272, "78.3", "79.7"),
    "vit_base_p16": (85_798_656, "76.1", "78.2"),
    "vit_base_p8": (85_807_872, "77.4", "80.1"),
    "resnet50": (23_508_032, "65.6", "74.5"),
    "resnet50_800ep": (23_508_032, "67.5", "75.3"),
    "xcit_small_12_p16": (26e6, "76.0", "77.8"),
    "xcit_small_12_p8": (26e6, "77.1", "79.2"),
    "xcit_medium_24_p16": (84e6, "76.4", "78.8"),
    "xcit_medium_24_p8": (84e6, "77.9", "80.3"),
    "vit_small_gldv2": (21_665_664, "51.5/24.3", "75.3/51.6"),
    "resnet18_cifar10": (11_168_832, "84.0", "91.0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_build_the_models_they_name(name):
    recipe = find_recipe(name)
    options = auto.resolve(recipe.options, 1_281_167, 400, True, 1)
    with torch.device("meta"):
        method = build_method(options)
    assert Plan(options, 1_281_167 // options.batch_size).rates(0).lr == 0
    parameters = sum(p.numel() for p in method.student.backbone.parameters())
    if name in PUBLISHED:
        count, *figures = PUBLISHED[name]
        assert parameters == count or round(parameters, -6) == count  # XCiT's are given in millions
        assert all(figure in recipe.expected for figure in figures)
    assert f"dino train {name if name != 'demo' else ''}".strip() in recipe.command
    ranks = int((re.search(r"--nproc-per-node (\d+)", recipe.command) or "1")[0].split()[-1])
    ranks *= int((re.search(r"--nnodes (\d+)", recipe.command) or "1")[0].split()[-1])
    assert options.batch_size % ranks == 0


RESOLVED = {"epochs", "batch_size", "head.out_dim", "method.momentum", "method.teacher_temp", "model.arch"}
RESOLVED |= {"model.patch_size", "views.global_size", "views.local_size", "optim.warmup_epochs", "data.num_workers"}


def as_toml(options: TrainOptions) -> str:
    import tomli_w

    return tomli_w.dumps(toml.to_dict(options))


@pytest.mark.parametrize("count", [1, 3, 10, 100, 5_000, 1_300_000])
@pytest.mark.parametrize("edge", [8, 32, 64, 500])
@pytest.mark.parametrize("gpu", [False, True])
def test_automatic_choices_are_consistent_for_any_data(count, edge, gpu):
    options = auto.resolve(TrainOptions(), count, edge, gpu, 1)
    assert 1 <= options.batch_size <= count
    assert options.model.patch_size is None or options.views.global_size % options.model.patch_size == 0
    assert options.model.patch_size is None or options.views.local_size % options.model.patch_size == 0
    assert options.views.local_size < options.views.global_size
    assert 0.9 <= options.method.momentum < 1


def test_chosen_values_are_round():
    options = auto.resolve(replace(TrainOptions(), {"epochs": 12}), 1000, 300, False, 1)
    assert options.method.teacher_temp_epochs == 3.6  # they are shown to people, who need no 3.5999999999999996


@pytest.mark.parametrize(("allowed", "spare", "used"), [(1, 3, 1), (4, 3, 3), (2, 1, 1)])
def test_threads_are_left_for_the_worker_but_none_added(allowed, spare, used, monkeypatch):
    """Whoever sets OMP_NUM_THREADS=1 on a shared machine gets one thread."""
    before = torch.get_num_threads()
    monkeypatch.setattr(run, "count_spare_cores", lambda: spare)
    try:
        torch.set_num_threads(allowed)
        run.set_threads(TrainOptions(), torch.device("cpu"))
        assert torch.get_num_threads() == used
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 1), (16, 1)])
def test_a_cpu_prepares_views_on_the_core_that_is_left(cores, workers, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "count_cores", lambda: cores)
    assert cli.main(["train", "--data", str(photos), "--out", str(tmp_path / "run"), "--epochs", "1", "--dry-run"]) == 0
    assert f"num_workers = {workers}\n" in capsys.readouterr().out


def test_eval_knn_prints_a_table(photos, tmp_path):
    dino.train(data=str(photos), out=str(tmp_path / "run"), recipe=replace(TrainOptions(), TINY))
    done = run_dino("eval", "knn", tmp_path / "run", "--data", photos, "--k", "10", "20", "100")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [line.split() for line in itertools.takewhile(lambda line: not line.startswith("To beat, "), lines[2:])]
    assert [row[0] for row in rows] == ["knn10_top1", "knn20_top1"]  # 100 are more than there are
    assert 0 <= float(rows[0][1]) <= 100
    assert lines[2 + len(rows)].startswith("To beat, ")


@pytest.mark.parametrize("given", [None, "active"])
def test_threads_wait_without_work_unless_the_user_says_so(given, monkeypatch, capsys):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert cli.main(["version"]) == cli.main(["--version"]) == 0
    assert os.environ["OMP_WAIT_POLICY"] == (given or "passive")


def test_a_reader_that_stops_reading_is_no_error():
    """As in `dino recipes | head -1`."""
    with subprocess.Popen(dino_command("recipes"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("command", [dino_command(), [Path(sys.executable).with_name("dino")]], ids=["-m", "script"])
def test_no_command_shows_help(command):
    """As users start it: nothing is forked."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "usage: dino COMMAND" in done.stdout


def test_held_out_images_of_other_classes_are_refused(photos, tmp_path, capsys):
    """Labels are numbered per folder, so a k-NN over different classes would compare the wrong ones."""
    draw_images(tmp_path / "val", 8, classes=2)
    flags = ["--data", str(photos), "--data.val", str(tmp_path / "val"), "--out", str(tmp_path / "run"), *tiny_flags()]
    assert cli.main(["train", *flags]) == 2
    said = capsys.readouterr().err
    assert "class2" in said
    assert "--data.labels none" in said
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", *flags, "--data.labels", "none", "--stop-after", "1"]) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["train", "--optim.lrr", "1"],
            "there is no option '--optim.lrr'; --help lists them. Did you mean '--optim.lr'?",
        ),
        (["train", "--epochs"], "--epochs needs a value behind it"),
        (["train", "--out", "-x"], "--out needs a value behind it; if that begins with '-', write --out=VALUE."),
        (["train", "--views.global-scale", "1"], "views.global_scale is (1.0,); give 2 values."),
        (["train", "--lr", "1"], "there is no option '--lr'; --help lists them. Did you mean '--optim.lr'?"),
        (["train", "--gpus", "2"], "for several start it with torchrun --nproc-per-node 2 -m dino train"),
        (["train", "--report", "false"], "a switch takes no 'false'; write its name alone, and --no-NAME for off."),
        (["plan", "--gpu", "A100"], "Did you mean 'a100'?"),
        (["train", "--data", "a.jpg", "b.jpg"], "'b.jpg' is one word too many; put a name with spaces in quotes"),
        (["train", "--device", "gpu"], "device is 'gpu'; choose one of auto, cpu, cuda, mps. Did you mean 'cuda'?"),
        (["eval", "knn"], "MODEL is missing; --help explains it."),
        (["eval", "runs/a"], "'eval' needs a second word; known are eval all, eval copydetect,"),
        (["train", "data=x y"], "'data=x y' is no recipe; write an option as --data 'x y'"),
        (
            ["train", "--learning-rate", "1"],
            "there is no option '--learning-rate'; --help lists them. Did you mean '--optim.lr'?",
        ),
        (["train", "--device", "tpu"], "device is 'tpu'; choose one of auto, cpu, cuda, mps."),
        (["eval", "knn", "m"], "--data is missing; --help explains it."),
        (["embed", "m", "--data", "x", "--out", "y"], "data is given by its place and not as '--data'"),
        (["eval", "knn", "m", "--data", "d", "--temp", "nan"], "temp is nan; it must be a finite number."),
        (["eval", "knn", "no\nmodel", "--data", "d"], "there is no run, weight file or release 'no\\nmodel'"),
        (["eval", "knn", "m" * 300, "--data", "d"], "File name too long"),
        (["ablate", "7", "--data", "/nowhere"], "'/nowhere' does not exist"),
    ],
)
def test_flags_are_refused_in_one_line(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(flags) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("dino: ")
    assert said in error
    assert error.count("\n") == 1
    assert "(add --debug" not in error
    assert not list(tmp_path.iterdir())
