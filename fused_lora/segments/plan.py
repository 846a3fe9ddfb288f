"""Which ranks of the slabs a pass multiplies, from the adapters of its segments.

The adapters of a linear lie side by side in slabs A (R, K) and B (N, R), each at a place of its own. A segment is rows
of x that follow one another and have the same adapters: none, one, or several whose updates add up, one on each level.
A window is as many ranks as a kernel multiplies at once; neighbouring segments whose adapters on a level lie in one
window share it. All of this is known before rows are counted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SLICE, BOX = 16, 64  # ranks that the tensor cores multiply at once; that a copy brings
BLOCK = 256  # rows that kernels look up together
SIZES = (16, 32, 64, 128, 256)  # of places


class Place(NamedTuple):
    """`size` ranks of the slabs from `rank` on, a multiple of size: what an adapter's own r leaves is zero."""

    rank: int
    size: int


def size_of(r: int) -> int:
    """The size of the place of an adapter."""
    return next(size for size in SIZES if r <= size)


def window_of(sizes: Iterable[int]) -> int:
    """The ranks of a window that has places of these sizes."""
    return max(BOX, *sizes, 0)


class Window(NamedTuple):
    """`rank` is its first one in the slabs; its rows are those of the segments `first` to `last`."""

    rank: int
    first: int
    last: int


class Level(NamedTuple):
    """Windows in the order of rows; and of each segment where its ranks begin among those of all levels' windows, put
    one after another, and its place. Both are None for a segment without an adapter here."""

    windows: tuple[Window, ...]
    begins: tuple[int | None, ...]
    places: tuple[Place | None, ...]


@dataclass(frozen=True)
class Plan:
    """At least one level, whose windows have `window` ranks each."""

    window: int
    levels: tuple[Level, ...]

    @property
    def windows(self) -> list[Window]:
        """Of all levels."""
        return [window for level in self.levels for window in level.windows]

    @property
    def ranks(self) -> int:
        """Of all windows."""
        return self.window * len(self.windows)

    def begins(self) -> dict[Place, tuple[int, ...]]:
        """Where each place of a segment begins among the ranks of the windows: once in each that has it."""
        found: dict[Place, dict[int, None]] = {}
        for level in self.levels:
            for place, begin in zip(level.places, level.begins, strict=True):
                if place is not None:
                    found.setdefault(place, {})[begin] = None
        return {place: tuple(begins) for place, begins in found.items()}


def make_plan(places: Sequence[Sequence[Place | None]], window: int = BOX) -> Plan:
    """The plan of segments whose adapters have these places, level by level; None where a segment has no adapter on a
    level. window is at least as large as each of them."""
    depth = max([1, *map(len, places)])
    levels: list[Level] = []
    begin = 0
    for level in range(depth):
        levels.append(_level([own[level] if level < len(own) else None for own in places], window, begin))
        begin += window * len(levels[-1].windows)
    return Plan(window, tuple(levels))


def _level(places: Sequence[Place | None], window: int, begin: int) -> Level:
    windows: list[Window] = []
    begins: list[int | None] = []
    before: int | None = None  # the window of the segment before
    for segment, place in enumerate(places):
        if place is None:
            begins.append(None)
            before = None
            continue
        rank = place.rank // window * window
        if before == rank:
            windows[-1] = windows[-1]._replace(last=segment)
        else:
            windows.append(Window(rank, segment, segment))
        begins.append(begin + (len(windows) - 1) * window + place.rank - rank)
        before = rank
    return Level(tuple(windows), tuple(begins), tuple(places))
