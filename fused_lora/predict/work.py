"""csrc's list of work with times instead of items, in the order of csrc/work/plan.cpp, and how long it takes.

Workers take what comes next; waiting for flags is left out. Which items are left for the end is what the order decides:
tests/csrc/test_predicted.py compares it with the planner's.
"""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil

from .products import GROUP

RIDING_ROWS = 32  # of a group where low comes from the first column of tiles


def makespan(times: Iterable[float], workers: int) -> float:
    """Until the last of `workers` has finished, who take what comes next."""
    ends = [0.0] * workers
    for time in times:
        heapq.heapreplace(ends, ends[0] + time)
    return max(ends)


@dataclass(frozen=True)
class Work:
    """Of one pass: rows and cols of tiles; gradient_cols items for each slice of tokens; and what each takes: a tile, a
    riding tile, a shrink item of one row (0: there is none), a gradient item of one row."""

    rows: int
    cols: int
    gradient_cols: int
    workers: int
    backward: bool
    long_tiles: bool
    pairs_shrinks: bool
    tile: float
    riding: float
    shrink: float
    gradient: float

    @property
    def waves(self) -> bool:
        return self.backward and self.long_tiles and 5 * self.cols <= self.workers

    @property
    def small_groups(self) -> bool:
        return self.backward and GROUP * self.cols < self.workers // 2 and not self.waves

    def groups(self) -> list[int]:
        """Rows of each."""
        count = ceil(self.rows / (RIDING_ROWS if self.riding else GROUP))
        if self.waves:
            busy = self.rows * (self.cols * self.tile + self.shrink + self.gradient_cols * self.gradient)
            least = ceil(self.rows * self.cols / self.workers)
            count = min(self.rows, max(1, round(busy / (self.workers * self.tile)), least))
        return [self.rows // count + (group < self.rows % count) for group in range(count)]

    def times(self) -> Iterator[float]:
        """In the order of the list."""
        groups = self.groups()
        shrink_lead = 4 if self.small_groups else 1
        gradient_lead = 2 if self.small_groups else 0
        rows_of = lambda group: groups[group] if 0 <= group < len(groups) else 0  # noqa: E731
        for group in range(-shrink_lead, len(groups)):
            tiles = list(self._tiles(rows_of(group)))
            late = 0 if self.long_tiles else len(tiles) // 4
            shrinks = list(self._shrinks(rows_of(group + shrink_lead)))
            yield from (*tiles, *shrinks) if self.waves else (*shrinks, *tiles[: len(tiles) - late])
            yield from self._gradients(rows_of(group + gradient_lead), halved=len(groups) == 1)
            yield from () if self.waves else tiles[len(tiles) - late :]

    def _tiles(self, rows: int) -> Iterator[float]:
        first = self.riding or self.tile
        yield from [first] * rows + [self.tile] * (rows * (self.cols - 1))

    def _shrinks(self, rows: int) -> Iterator[float]:
        if self.shrink:
            batch = 2 if self.pairs_shrinks and not self.waves else 1
            stride = ceil(rows / batch)
            yield from (self.shrink * ceil((rows - i) / stride) for i in range(stride))

    def _gradients(self, rows: int, halved: bool) -> Iterator[float]:
        slices = [ceil(rows / 2), rows // 2] if halved and rows > 4 else [rows]
        yield from (part * self.gradient for part in slices if part for _ in range(self.gradient_cols))
