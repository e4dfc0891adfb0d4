"""Streams of random numbers: none shares a key with another, and their numbers are those of every run before."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from dino import randomness
from dino.data.order import order_epoch
from dino.data.scenes import Scenes
from dino.eval.lowshot import deal_folds
from dino.eval.supervised import draw_per_class
from dino.randomness import Stream, draw_words, open_stream

FIRST = {
    Stream.ORDER: [8748749589256922267, 1161946882976756276],
    Stream.VIEWS: [6737060701186442747, 7266156193745453496],
    Stream.DROP_PATH: [7467032871062792357, 2429639621719829570],
    Stream.CENTERS: [228375655948911838, 6360035475185611769],
    Stream.PATCHES: [2775793708389330342, 2373510452186404125],
}
FIRST_AT_PART_5 = {
    Stream.SELECTED: [2651242621020824525, 4795500566233658325],
    Stream.SCENES: [449545590169594894, 7479437727250208597],
    Stream.SCENE_LABELS: [917367022885265731, 3147774925251675048],
}
FIRST_WORDS = {
    Stream.HELD_OUT: [63359548519342423, 2347432052672581161],
    Stream.CLASSES: [14380131802003362078, 3418723515934387727],
    Stream.FOLDS: [8440547070838707184, 291008221368904946],
}


def test_the_first_numbers_of_each_stream():
    assert FIRST.keys() | FIRST_AT_PART_5.keys() | FIRST_WORDS.keys() == set(Stream)
    for stream, numbers in FIRST.items():
        assert open_stream(stream, 7, 3, 5).integers(0, 2**63, 2).tolist() == numbers
    for stream, numbers in FIRST_AT_PART_5.items():
        assert open_stream(stream, 7, 5).integers(0, 2**63, 2).tolist() == numbers
    for stream, numbers in FIRST_WORDS.items():
        assert draw_words(stream, 7, 2).tolist() == numbers


def test_what_is_made_of_them():
    assert order_epoch(7, 3, 10).tolist() == [9, 4, 8, 7, 1, 5, 3, 2, 6, 0]
    assert Scenes(20, seed=3).labels.tolist() == [3, 4, 8, 2, 7, 5, 0, 1, 6, 9, 0, 7, 1, 2, 8, 6, 3, 9, 4, 5]
    assert deal_folds(np.arange(10) % 2, 3, 7).tolist() == [2, 2, 0, 0, 1, 0, 1, 2, 0, 1]
    assert draw_per_class(np.arange(20) % 2, 0.3, 7).tolist() == [1, 2, 5, 6, 14, 17]


def test_the_first_numbers_of_the_global_generators():
    randomness.seed_step(7, 1, 5)
    assert torch.initial_seed() == 13164998824995918645
    randomness.seed_augmentation(7, 3, 5, 1)
    assert (random.getrandbits(32), np.random.randint(2**31), torch.initial_seed()) == (
        4226403882,
        671868252,
        3191274317,
    )
    randomness.seed_mixing(7, 5)
    assert (random.getrandbits(32), np.random.randint(2**31), torch.initial_seed()) == (
        3152915834,
        124333744,
        1405020354,
    )
    randomness.seed_finetuning_step(7, 1, 5)
    assert (random.getrandbits(32), np.random.randint(2**31), torch.initial_seed()) == (
        3134571220,
        615748913,
        3298102554,
    )


@pytest.mark.parametrize("seed", [0, 7])
def test_no_two_streams_share_a_key(seed):
    parts = [0, 1, 5, 10**6, 2**48 - 1]
    places = set()
    for stream, part in itertools.product(Stream, parts):
        state = open_stream(stream, seed, part, 5).bit_generator.state["state"]
        places.add((*state["key"].tolist(), *state["counter"].tolist()[2:]))
    assert len(places) == len(Stream) * len(parts)


def test_seeds_of_one_purpose_are_all_different():
    few, many = range(5), range(20)
    for function, ranges in (
        (randomness.seed_step, (few, many)),
        (randomness.seed_augmentation, (few, few, few)),
        (randomness.seed_mixing, (many,)),
        (randomness.seed_finetuning_step, (few, many)),
    ):
        seeds = []
        for key in itertools.product(*ranges):
            function(7, *key)
            seeds.append(torch.initial_seed())
        assert len(set(seeds)) == len(seeds)


def test_a_stream_is_a_function_of_all_of_its_key():
    for stream in Stream:
        keys = [(7, 1, 2), (8, 1, 2), (7, 3, 2), (7, 1, 4)]
        assert len({int(open_stream(stream, *key).integers(0, 2**63)) for key in keys}) == len(keys)
