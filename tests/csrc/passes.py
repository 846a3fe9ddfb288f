"""Passes of csrc's kernels by their sizes, and some of every kind."""

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

CLUSTER, CONSUMERS, BOX, BLOCK_M = 2, 2, 64, 128
PAIR_ROWS = CLUSTER * BLOCK_M
FLAG_ROWS, CHAIN_FLAGS, NONE = 64, 4, -1
LOOKAHEAD, FLAG_PARTS = 8, 2
Turns = Iterator[Callable[[], bool]]  # of a thread: what must hold before it goes on


def boxes_of(size: int) -> int:
    return -(-size // BOX)


@dataclass(frozen=True)
class Part:
    """A linear of a group."""

    cols: int
    depth: int
    r: int
    wants_a: bool
    wants_b: bool
    reads_y: bool = False
    stored: bool = False


@dataclass(frozen=True)
class Pass:
    M: int
    backward: bool
    drops: bool
    wants_out: bool
    gated: bool
    block_n: int
    clusters: int
    parts: tuple[Part, ...]
    summed: int

    def __str__(self):
        kind = (self.M, self.backward, self.drops, self.wants_out, self.gated)
        own = (*kind, self.block_n, self.clusters, len(self.parts), self.summed)
        numbers = own + sum((dataclasses.astuple(part) for part in self.parts), ())
        return " ".join(str(int(number)) for number in numbers)


def promised_floats(each: Pass) -> int:
    """docs/hopper.md: one copy of dA and dB, and two sums of each column of dy; r padded to 16, 64, 128 or 256, the
    widths to multiples of 512."""
    rank = next(most for most in (16, 64, 128, 256) if max(part.r for part in each.parts) <= most)
    of_a = sum(-(-part.cols // 512) * 512 * rank for part in each.parts if part.wants_a)
    return of_a + sum(-(-part.depth // 512) * 512 * (rank + 2) for part in each.parts if part.wants_b)


class RingSizes(NamedTuple):
    """Where weights in a format are dequantised: as csrc/work/ring.h has it."""

    tiles: int
    of_tile: int
    pieces: int
    ready: int
    ready_stride: int
    done: int
    bytes: int
    stride: int


class Sizes(NamedTuple):
    """What list_work.cu says of a pass's plan, and of the kernel that is its."""

    low_flags: int
    chain_flags: int
    flags: int
    floats: int
    finish_spacing: int
    tile_cols: int
    gradient_cols: int
    stages: int
    tile_boxes: int
    out_boxes: int
    rank_boxes: int
    shrink_halves: int
    gradient_blocks: int
    ring: RingSizes


def some_passes(count, widths=(1, 136, 151, 512, 4096, 8191, 50257), most_width=14400, most_rows=40000, seed=0):
    rng, of_y, of_formats = (random.Random(seed) for _ in range(3))
    for _ in range(count):
        backward, wants_out, gated = rng.random() < 0.7, rng.random() < 0.8, rng.random() < 0.3
        shared = rng.choice([17, 64, 1001, *widths, rng.randint(1, most_width)])
        parts = []
        for i in range((1 if backward else 2) if gated else rng.choice([1, 1, 2, 3, 4])):
            own, r = (
                rng.choice([*widths, rng.randint(1, most_width)]),
                rng.choice([0, 1, 16, 17, 64, 100, 128, *([] if gated else [129, 256])]),
            )
            own = parts[0].cols if gated and i else own
            sums = backward and not gated  # a gated backward pass makes nothing but tiles
            wants = [sums and r > 0 and rng.random() < 0.8, sums and rng.random() < 0.8]
            reads_y = wants[1] and of_y.random() < 0.3
            stored = of_formats.random() < 0.3
            parts.append(Part(*((shared, own) if backward else (own, shared)), r, *wants, reads_y, stored))
        wants_out = wants_out or gated or not backward or not any(part.wants_a or part.wants_b for part in parts)
        block_n = 256 if gated or max(part.r for part in parts) > 128 else rng.choice([128, 256])
        summed = len(parts)
        if backward and not gated and summed > 1 and rng.random() < 0.3:
            summed -= 1  # the last one's x is its own
            parts[-1] = dataclasses.replace(parts[-1], cols=rng.choice([1, 136, most_width]))
        M = rng.choice([1, 255, 256, 257, 2048, 2049, rng.randint(1, most_rows)])
        drops, clusters = rng.random() < 0.5, rng.choice([1, 5, 57, 66])
        yield Pass(M, backward, drops, wants_out, gated, block_n, clusters, tuple(parts), summed)
