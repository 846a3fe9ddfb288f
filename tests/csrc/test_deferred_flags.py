"""The list of work as clusters play it, with flags raised late: nobody waits for ever, and each has one writer."""

import random

import pytest

from tests.csrc.consumers import Consumer, Outbox
from tests.csrc.passes import Part, Pass, some_passes
from tests.csrc.playing import Launch

PLAYS = 3  # of each pass: whose turn is next, and how out leaves, are drawn anew


def small_passes():
    """Such that ride, into one column of tiles and more; of few steps; of many, where lists have other orders."""
    for cols, M in ((100, 300), (700, 1000)):
        yield Pass(M, False, False, True, False, 256, 66, (Part(cols, 200, 16, False, False),), 1)
    yield from some_passes(120, (1, 136, 300), 700, 1500)
    yield from some_passes(10, (300, 3100), 3100, 600, seed=1)


def play(list_work, passes, launch=Launch):
    passes = list(passes)
    for each, (sizes, items) in zip(passes, list_work(passes), strict=True):
        for seed in range(PLAYS):
            rng = random.Random(seed)
            launch(each, sizes, items, rng, clusters=rng.choice([1, 2, 3])).play()


def test_nobody_waits_for_ever(list_work):
    play(list_work, small_passes())


def passes_by_rings():
    """Of weights in a format, with so many clusters that those which make ranks read weights next whose place is not
    free yet."""
    for M, cols, depth, r in ((1000, 1600, 1024, 16), (1000, 900, 3100, 40), (600, 2000, 700, 200)):
        for backward in (False, True):
            part = Part(cols, depth, r, backward, backward, False, True)
            yield Pass(M, backward, False, True, False, 256, 66, (part,), 1)
    part = Part(900, 1000, 16, False, False, False, True)
    yield Pass(1000, False, False, True, True, 256, 66, (part, part), 2)


def play_by_rings(list_work):
    passes = list(passes_by_rings())
    for each, (sizes, items) in zip(passes, list_work(passes), strict=True):
        assert sizes.ring.pieces > 0
        for clusters in (3, 60):
            Launch(each, sizes, items, random.Random(0), clusters).play()


def test_nobody_waits_for_ever_for_a_weight(list_work):
    play_by_rings(list_work)


@pytest.mark.parametrize(("owner", "name"), [(Consumer, "waits_for_weight"), (Launch, "raise_")])
def test_a_fault_of_rings_is_found(owner, name, list_work, monkeypatch):
    """That which was there: a flag of ranks is kept while a tile waits for its weight."""
    wrong = all_but_every_hundredth if name == "raise_" else lambda self: False
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match="wait for ever"):
        play_by_rings(list_work)


def nothing(*_):
    yield from ()


def all_but_every_hundredth(self, flag):
    if flag % 100:
        self.raised.add(flag)


def as_if_a_tile(self):
    self.whole_tile = self.parts > 0
    yield from finish(self)


finish = Outbox.finish
# What has gone wrong in the kernels, or could: a method of the play, what stands in its place, what is found then.
FAULTS = {
    "a raise is forgotten": (Launch, "raise_", all_but_every_hundredth, "wait for ever"),
    "another's flag is raised": (Consumer, "own_flag", lambda self, flag: flag + self.index, "two writers"),
    "a block does not leave": (Launch, "leave", lambda self: None, "counters"),
    "a flag is left behind": (Outbox, "send_flag", nothing, "wait for ever"),
    "what is left is not sent where nothing is sent later": (Outbox, "empty", nothing, "wait for ever"),
    "a tile does not send it first": (Consumer, "sends_flag_first", lambda *_: False, "wait for ever"),
    "the last to leave is taken for a tile": (Outbox, "finish", as_if_a_tile, "wait for ever"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, list_work, monkeypatch):
    owner, name, wrong, found = FAULTS[fault]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match=found):
        play(list_work, small_passes())


def test_an_item_before_what_it_waits_for_is_found(list_work):
    each = Pass(1000, False, False, True, False, 128, 66, (Part(300, 300, 40, False, False),), 1)
    ((sizes, items),) = list_work([each])
    with pytest.raises(AssertionError, match="wait for ever"):
        Launch(each, sizes, items[::-1], random.Random(0), clusters=2).play()
