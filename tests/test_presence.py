"""What ranks hear of one another between the steps of a run."""

from __future__ import annotations

import re
import subprocess
import sys

from torch.distributed import HashStore

import processes
from dino import distributed
from dino.engine.presence import SILENT, Presence
from helpers import draw_images, tiny_flags


def join(monkeypatch, store: HashStore, rank: int, machines: list[str]) -> Presence:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    store.set(str(rank), "")
    return Presence(store, machines)


def test_a_silent_rank_is_named_to_all(monkeypatch):
    store = HashStore()
    ranks = [join(monkeypatch, store, rank, ["a", "b", "c"]) for rank in range(3)]
    for _ in range(3 * SILENT):  # all are there
        assert [rank.listen() for rank in ranks] == ["", "", ""]
    heard = [(ranks[0].listen(), ranks[1].listen()) for _ in range(SILENT + 1)]
    assert heard[:-1] == [("", "")] * SILENT
    assert heard[-1] == ("rank 2 on c", "rank 2 on c")


def test_a_silent_main_rank_is_named(monkeypatch):
    store = HashStore()
    main, other = (join(monkeypatch, store, rank, ["a", "b"]) for rank in range(2))
    main.listen()
    heard = [other.listen() for _ in range(SILENT + 1)]
    assert [*{*heard[:-1]}, heard[-1]] == ["", "rank 0 on a"]


def test_a_rank_that_is_done_is_not_missed(monkeypatch):
    store = HashStore()
    main, _ = (join(monkeypatch, store, rank, ["a", "b"]) for rank in range(2))
    store.set("1", "left")  # as `watching` does when its block ends
    assert not any(main.listen() for _ in range(3 * SILENT))


STOPS_IN_SET_UP = """
import os, signal, sys
from dino import cli, run
from dino.engine import presence

presence.BEAT = 0.3
if os.environ["RANK"] == "1":
    run.set_up = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_machine_that_stops_before_the_first_step_is_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STOPS_IN_SET_UP)
    flags = [
        "train",
        "--data",
        str(draw_images(tmp_path / "photos")),
        "--out",
        str(tmp_path / "run"),
        *tiny_flags(epochs=1),
    ]
    with processes.start(
        [sys.executable, str(script), *flags], ranks=2, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        said = process.communicate(timeout=100)[1]
    assert process.returncode == 1
    assert re.search(r"no word from rank 1 on .* for 4 seconds", said), said
    assert "it had not begun to train, so give the same command again" in said
