"""Bytes matter more on most cards of compute capability 8 than on the one that csrc/sm80 was measured on."""

import subprocess
from pathlib import Path

import pytest

from tests.csrc.traffic import CARDS, Cache, Item, Sizes, flops, least_bytes, memory_bytes

SHAPES = [Sizes(8192, 4096, 4096, 16), Sizes(8192, 4096, 4096, 128), Sizes(16384, 2048, 2048, 128)]
MOST = 0.75  # of the products' time


@pytest.fixture(scope="session")
def list_sm80(compile_list):
    program = compile_list(Path(__file__).parent / "list_sm80.cu")

    def run(sizes, backward, card):
        line = " ".join(map(str, [*sizes, int(backward), card.sm_count, card.shared_memory]))
        done = subprocess.run([str(program)], input=line, capture_output=True, text=True, check=True)
        return [Item(*map(int, numbers)) for numbers in zip(*[iter(done.stdout.split())] * 5, strict=True)]

    return run


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
