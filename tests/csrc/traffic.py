"""csrc/sm80's list of work played through a cache: which bytes come from memory on a card.

Workers take items in the order of the list and go through blocks of 256 x 256 (a weight's: 256 x 128) at the pace of
their products. The cache forgets what was used longest ago. Waiting is left out.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from fused_lora.cards import CARDS as KNOWN
from fused_lora.cards import Card
from tests.csrc.items import GRADIENT_A, SHRINK, TILE, Item

ROWS, COLS, BLOCK = 256, 128, 256
SHRINK_PACE = 0.5  # of a tile's time for the same depth


CARDS = {name: KNOWN[name] for name in ("A100 40 GB", "A6000", "RTX 3090", "RTX 4090", "L40S")}


class Sizes(NamedTuple):
    M: int
    K: int
    N: int
    r: int


class Cache:
    """Least recently used blocks go first. Counts what comes from memory, and what is written to it."""

    def __init__(self, size: int):
        self.left, self.blocks, self.bytes = size, OrderedDict(), 0

    def use(self, block: tuple, size: int) -> None:
        if block in self.blocks:
            self.blocks.move_to_end(block)
            return
        self.bytes += size  # what is written reaches memory once
        self.blocks[block] = size
        self.left -= size
        while self.left < 0:
            self.left += self.blocks.popitem(last=False)[1]


Use = tuple[tuple, int]


def uses(sizes: Sizes, item: Item, backward: bool) -> Iterator[tuple[float, list[Use]]]:
    """Of an item: how long it takes, in tiles' steps of 256, and the blocks that it then uses."""
    depth, read = (sizes.N, "dy") if backward else (sizes.K, "x")
    big, low = 2 * ROWS * BLOCK, 2 * ROWS * sizes.r
    row, steps = item.row // ROWS, range(-(-depth // BLOCK))
    ends = True
    if item.is_half:
        cut, ends = len(steps) // 2, not item.is_first
        steps = steps[:cut] if item.is_first else steps[cut:]
        yield 0.0, [(("half", item.own), 4 * ROWS * COLS)]
    if item.work == SHRINK:
        yield from ((SHRINK_PACE, [((read, row, k), big)]) for k in steps)
        yield 0.0, [(("low", row), low)] if ends else []
    elif item.work == TILE:
        col = item.col // COLS
        yield from ((1.0, [((read, row, k), big), (("weight", k, col), 2 * BLOCK * COLS)]) for k in steps)
        yield 0.0, [(("low", row), low), (("out", row, col), 2 * ROWS * COLS)] if ends else []
    else:
        source, other = ("x", "low") if item.work == GRADIENT_A else ("dy", "xa")
        for token in range(row, row + item.rows // ROWS):
            yield 1.0, [((source, token, item.col // BLOCK), big), ((other, token), low)]
        yield 0.0, [(("sums", item.work, item.col, item.own), 4 * BLOCK * min(max(sizes.r, 16), 128))]


def memory_bytes(sizes: Sizes, items: list[Item], backward: bool, card: Card) -> int:
    cache, waiting, number = Cache(card.l2 << 20), iter(items), itertools.count()
    at_work = [(0.0, next(number), iter(())) for _ in range(card.sm_count)]
    while at_work:
        now, _, own = heapq.heappop(at_work)
        step = next(own, None)
        if step is None:
            item = next(waiting, None)
            if item is not None:
                heapq.heappush(at_work, (now, next(number), uses(sizes, item, backward)))
            continue
        takes, blocks = step
        for block, size in blocks:
            cache.use(block, size)
        heapq.heappush(at_work, (now + takes, next(number), own))
    return cache.bytes


def least_bytes(sizes: Sizes, backward: bool) -> int:
    M, K, N, r = sizes
    activations = M * (K + N) + (M * K if backward else 0)
    return 2 * (activations + N * K + M * r * (2 if backward else 1))


def flops(sizes: Sizes, backward: bool) -> int:
    M, K, N, r = sizes
    return 2 * M * (K * N + (2 if backward else 1) * r * (K + N))
