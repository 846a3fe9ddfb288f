"""csrc's kernels: one launch forward, one backward (docs/hopper.md, docs/sm80.md).

    time = launch + heat (makespan of the list of work)
    tile      (steps over depth + r) pace step + tile_end
    shrink    steps over depth (shrink + hidden ranks / 256 step)          of 256 rows
    gradient  steps over its tokens (gradient + hidden products)           of columns of dA and dB

ranks are r as the kernels pad it, and hidden = 1 / 2 of the time of these items' products, which their loads hide.
Memory's time is the least that a launch takes.
"""

from math import ceil

from ..cards import Card
from .products import (
    NARROW,
    Launch,
    Tiling,
    heated,
    memory_time,
    rows_fit,
    step_time,
    tile_bytes,
    tiling_of,
)
from .rates import Rates
from .work import Work, makespan

HIDDEN = 0.5
MOST_RANK = 256
RIDES_UP_TO = 16, 4  # ranks and columns of tiles
RIDING = 1.12, 2.0  # a riding tile's time over another's, and us (docs/hopper.md)
LONG = 3072  # depth of long tiles


def block_rank(r: int) -> int:
    """To which the kernels pad it. Raises ValueError for ranks that they do not take."""
    if r > MOST_RANK:
        raise ValueError(f"csrc's kernels take ranks up to {MOST_RANK}, got r={r}")
    return next(block for block in (16, 64, 128, 256) if r <= block)


def launch(name: str, M: int, N: int, depth: int, r: int, card: Card, rates: Rates, started: float, itemsize: int):
    """out (M, N) = lhs (M, depth) weight + low up; named "backward", with the gradients of both factors."""
    backward = name == "backward"
    work = work_of(M, N, depth, r, card, rates, backward)
    moved = _bytes(M, N, depth, r, card, itemsize, backward)
    us = heated(makespan(work.times(), work.workers), started, rates.csrc.sag, rates.cublas.settle)
    flops = 2 * M * N * depth + (2 if backward else 1) * 2 * M * r * (N + depth)
    us = rates.csrc.launch + max(us, memory_time(card, rates.cublas, moved))
    us += rates.cublas.launch if r % 8 else 0.0  # B is copied to padded rows
    return Launch(f"lora_linear_kernel ({name})", flops, moved, us)


def work_of(M: int, N: int, depth: int, r: int, card: Card, rates: Rates, backward: bool) -> Work:
    hopper, tiling, ranks = card.capability >= 90, tiling_of(card), block_rank(r)
    narrow = hopper and ranks <= 128 and tiling.width(M, N, (1.0, 0.5)) < 1
    rows, cols = ceil(M / tiling.rows), ceil(N / (tiling.cols // 2 if narrow else tiling.cols))
    step = rates.csrc.pace * step_time(card, tiling)
    tile = (tiling.steps(depth) + r / tiling.depth) * step * (NARROW if narrow else 1) + rates.cublas.tile_end
    rides = hopper and not backward and r <= RIDES_UP_TO[0] and cols <= RIDES_UP_TO[1]
    wide_gradients = hopper and not narrow and ranks <= 128
    return Work(
        rows, cols, _gradient_items(N, depth, wide_gradients) if backward else 0, tiling.workers, backward,
        long_tiles=depth >= LONG, pairs_shrinks=hopper and depth >= LONG and not narrow and ranks <= 128,
        tile=tile, riding=RIDING[0] * tile + RIDING[1] if rides else 0,
        shrink=0 if rides else _shrink(depth, ranks, tiling, rates, step, deep=hopper and not narrow and ranks <= 64),
        gradient=_gradient(ranks, tiling, rates, step, 512 if wide_gradients else 256),
    )  # fmt: skip


def _shrink(depth: int, ranks: int, tiling: Tiling, rates: Rates, step: float, deep: bool) -> float:
    """Of one item's rows; deep: a step is of twice the depth."""
    loads = rates.csrc.shrink * (0.5 if deep else 1) * _items_of_ranks(ranks, tiling)
    return tiling.steps(depth) * (loads + HIDDEN * ranks / tiling.cols * step)


def _items_of_ranks(ranks: int, tiling: Tiling) -> int:
    """An item has as many ranks as a tile has columns, on which their sums lie."""
    return ceil(ranks / tiling.cols)


def _gradient_items(N: int, depth: int, wide: bool) -> int:
    cols = 512 if wide else 256
    return ceil(N / cols) + ceil(depth / cols)


def _gradient(ranks: int, tiling: Tiling, rates: Rates, step: float, cols: int) -> float:
    """Of one item's tokens, as many as a tile has rows."""
    products = cols * ranks / (tiling.rows * tiling.cols) * step
    loads = rates.csrc.gradient * cols / (512 if tiling.depth == 64 else 256) * _items_of_ranks(ranks, tiling)
    return tiling.steps(tiling.rows) * (loads + HIDDEN * products)


def _bytes(M: int, N: int, depth: int, r: int, card: Card, itemsize: int, backward: bool) -> float:
    """A tile's, factors and low; x of the gradients; and lhs again for shrink and gradient items where L2 loses it."""
    again = 0 if rows_fit(card, depth, itemsize) else 1 + backward
    own = M * N if backward else 0
    factors = r * (N + depth) * (2 if backward else 1) + M * r * (2 if backward else 1)
    return tile_bytes(M, N, depth, card, itemsize) + (again * M * depth + own + factors) * itemsize
