"""Items of csrc/sm80's lists that are cut in two."""

import itertools

import pytest

from fused_lora.cards import CARDS
from tests.csrc.items import SHRINK, TILE
from tests.csrc.traffic import Sizes

SHAPES = [
    Sizes(8192, 4096, 4096, 16),
    Sizes(16384, 2048, 2048, 128),
    Sizes(32768, 1024, 1024, 200),
    Sizes(700, 512, 513, 64),
]
SHARED = [Sizes(4096, 1024, 2048, 64), Sizes(8192, 1024, 1024, 128), Sizes(640, 2048, 768, 16)]
CARDS_OF_IT = ("A100 80 GB", "A6000", "RTX 4090")


def merged(items):
    """(item, whether it was cut) before the cuts: halves follow one another, and are alike but for their order."""
    numbers, items = itertools.count(), iter(items)
    for item in items:
        if not item.is_half:
            yield item, False
            continue
        other = next(items)
        assert item.work in (SHRINK, TILE)
        assert (item.bits, other.bits) == (8 | 1, 8 | 2)
        assert item._replace(bits=0) == other._replace(bits=0)
        assert item.own == next(numbers)
        yield item._replace(bits=0, own=0), True


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("name", CARDS_OF_IT)
@pytest.mark.parametrize(("drops", "parts"), [(False, 1), (True, 1), (False, 3), (True, 2)])
def test_halves_are_the_items_that_were_cut(list_sm80, name, sizes, backward, drops, parts):
    card, kind = CARDS[name], {"drops": drops, "parts": parts}
    whole = list_sm80(sizes, backward, card, halves=False, **kind)
    assert not any(item.is_half for item in whole)
    items = list(merged(list_sm80(sizes, backward, card, **kind)))
    assert [item for item, _ in items] == whole
    # Shrink items at the beginning and tiles at the end.
    for work, in_order in ((SHRINK, items), (TILE, items[::-1])):
        cut = [was_cut for item, was_cut in in_order if item.work == work]
        assert cut == sorted(cut, reverse=True)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", SHARED, ids=str)
def test_passes_that_share_a_list_would_have_the_same(list_sm80, sizes, backward):
    """Whichever came first: otherwise what a pass is summed like would depend on those before it."""
    for name in CARDS_OF_IT:
        fewer = [list_sm80(sizes._replace(M=sizes.M - less), backward, CARDS[name]) for less in (0, 1, 127)]
        assert fewer[0] == fewer[1] == fewer[2]


def test_where_workers_would_wait(list_sm80):
    """Long shrink items, and 1,024 tiles for 108 workers."""
    items = list_sm80(Sizes(16384, 2048, 2048, 128), False, CARDS["A100 80 GB"])
    assert any(item.is_half for item in items if item.work == SHRINK)
    # 64 tiles for 132 workers, each of which can have half a tile.
    for backward in (False, True):
        items = list_sm80(Sizes(512, 4096, 4096, 16), backward, CARDS["H200"])
        assert all(item.is_half for item in items if item.work == TILE)
    # Their shrink items too, also where L2 is small.
    items = list_sm80(Sizes(256, 4096, 4096, 16), False, CARDS["A6000"])
    assert all(item.is_half for item in items)
    # 1,056 short and long items for 132: nothing to gain.
    assert not any(item.is_half for item in list_sm80(Sizes(8192, 4096, 4096, 16), False, CARDS["H200"]))
