"""What ranks hear of one another between the steps of a run."""

from __future__ import annotations

from torch.distributed import HashStore

from dino import distributed
from dino.engine.presence import SILENT, Presence


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
