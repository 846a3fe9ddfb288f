"""A product by tiles: out (M, N), summed over a depth, and what it reads.

    time = launch + heat (waves (steps step + tile_end))
    waves = ceil(tiles / workers)        step = pace 2 rows cols depth / (peak tflops / workers)
    heat(t) = t (1 + sag (1 - exp(-(started + t / 2) / settle)))

A worker is what makes a tile: on Hopper two SMs, 256 x 256 in steps of 64; before it one SM, 256 x 128 in steps of 32.
cuBLAS's tiles and csrc's are of these sizes. Where that is through earlier, they are half as wide in 0.56 of the time;
cuBLAS's on Hopper also three quarters in 0.78.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, exp

from ..cards import Card
from .rates import Products

# Of a tile's time, by the share of its columns; the first is csrc's (csrc/sm90/tiling.cuh).
NARROW = 0.56
TIMES = {1.0: 1.0, 0.75: 0.78, 0.5: NARROW}
GROUP = 8  # items' rows whose tiles run together, so that L2 serves them


@dataclass(frozen=True)
class Launch:
    """flops: those that the result needs. bytes: from and to memory. us: predicted."""

    name: str
    flops: float
    bytes: float
    us: float


@dataclass(frozen=True)
class Tiling:
    """Tiles of an architecture, and how many are made at once."""

    cols: int
    depth: int  # of a step
    workers: int
    rows: int = 256

    def steps(self, depth: int) -> int:
        return ceil(depth / self.depth)

    def waves(self, M: int, N: int, width: float) -> float:
        """Tiles over workers, of that share of the columns."""
        return ceil(M / self.rows) * ceil(N / (width * self.cols)) / self.workers

    def width(self, M: int, N: int, widths: tuple[float, ...]) -> float:
        """With which of these the last tile is done first."""
        return min(widths, key=lambda width: TIMES[width] * ceil(self.waves(M, N, width)))


def tiling_of(card: Card) -> Tiling:
    return Tiling(256, 64, card.sm_count // 2) if card.capability >= 90 else Tiling(128, 32, card.sm_count)


def cublas_widths(card: Card) -> tuple[float, ...]:
    return (1.0, 0.75, 0.5) if card.capability >= 90 else (1.0, 0.5)


def step_time(card: Card, tiling: Tiling) -> float:
    """Of a tile."""
    return 2 * tiling.rows * tiling.cols * tiling.depth * tiling.workers / (card.peak * card.tflops * 1e6)


def heated(us: float, started: float, sag: float, settle: float) -> float:
    """us of work that begins after `started` us of other work."""
    return us * (1 + sag * (1 - exp(-(started + us / 2) / settle)))


def memory_time(card: Card, products: Products, bytes_moved: float) -> float:
    return bytes_moved / (products.stream * card.gigabytes * 1e3)


def rows_fit(card: Card, depth: int, itemsize: int) -> bool:
    """Whether L2 keeps the rows of lhs whose tiles run together; as much again streams through meanwhile."""
    return 2 * GROUP * 256 * depth * itemsize <= card.l2 << 20


def weight_fits(card: Card, N: int, depth: int, itemsize: int) -> bool:
    """Whether L2 keeps a weight from one such group to the next."""
    return 3 * N * depth * itemsize <= card.l2 << 20


def tile_bytes(M: int, N: int, depth: int, card: Card, itemsize: int) -> float:
    """That all tiles read and write: lhs once where a group's rows stay in L2, else once a wave; the weight once where
    it stays, else once a group."""
    tiling = tiling_of(card)
    waves = ceil(GROUP * ceil(N / tiling.cols) / tiling.workers)
    lhs = 1 if rows_fit(card, depth, itemsize) else waves
    weight = 1 if weight_fits(card, N, depth, itemsize) else ceil(M / (GROUP * tiling.rows))
    return (M * depth * lhs + N * depth * weight + M * N) * itemsize


def product(name: str, M: int, N: int, depth: int, card: Card, products: Products, started: float, itemsize: int):
    """One launch that does nothing else."""
    tiling = tiling_of(card)
    width = tiling.width(M, N, cublas_widths(card))
    steps = tiling.steps(depth) * products.pace * step_time(card, tiling) * TIMES[width]
    moved = tile_bytes(M, N, depth, card, itemsize)
    us = heated(ceil(tiling.waves(M, N, width)) * (steps + products.tile_end), started, products.sag, products.settle)
    return Launch(name, 2 * M * N * depth, moved, products.launch + max(us, memory_time(card, products, moved)))


def thin(name: str, M: int, K: int, r: int, card: Card, products: Products, itemsize: int, reads: int = 1) -> Launch:
    """A product of one long matrix (M, K) and ranks: bound by that matrix's bytes, `reads` times, or by its rate."""
    flops, moved = 2 * M * K * r, (reads * M * K + r * (M + K)) * itemsize
    padded = 2 * M * K * max(16, r)
    us = max(memory_time(card, products, moved), padded / (products.skinny * card.peak * card.tflops * 1e6))
    return Launch(name, flops, moved, products.launch + us)


def total(launches: Iterable[Launch]) -> float:
    return sum(launch.us for launch in launches)
