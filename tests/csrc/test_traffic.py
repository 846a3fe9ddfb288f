"""Bytes matter more on most cards of compute capability 8 than on the one that csrc/sm80 was measured on."""

import pytest

from tests.csrc.traffic import CARDS, Cache, Sizes, flops, least_bytes, memory_bytes

SHAPES = [Sizes(8192, 4096, 4096, 16), Sizes(8192, 4096, 4096, 128), Sizes(16384, 2048, 2048, 128)]
MOST = 0.75  # of the products' time


def test_a_cache_forgets_what_was_used_longest_ago():
    cache = Cache(20)
    for block in "abacab":  # c takes b's place, and b a's
        cache.use((block,), 10)
    assert cache.bytes == 40
    assert list(cache.blocks) == [("a",), ("b",)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
@pytest.mark.parametrize("name", CARDS)
def test_memory_is_faster_than_the_products(list_sm80, name, sizes, backward):
    card = CARDS[name]
    items = list_sm80(sizes, backward, card)
    total = memory_bytes(sizes, items, backward, card)
    of_memory, of_products = total / (card.gigabytes * 1e9), flops(sizes, backward) / (card.tflops * 1e12)
    times = total / least_bytes(sizes, backward)
    print(f"{name}: {total >> 20} MB, {times:.2f} of the least; {of_memory / of_products:.2f} of the products' time")
    assert total >= 0.98 * least_bytes(sizes, backward)
    assert of_memory < MOST * of_products
