"""Which ranks of the slabs a pass multiplies, from the adapters of its segments.

The adapters of a linear lie side by side in slabs A (R, K) and B (N, R), each at a place of its own. A segment is rows
of x that follow one another and have the same adapter, or none. A window is as many ranks as a kernel multiplies at
once; neighbouring segments whose adapters lie in one window share it. All of this is known before rows are counted.
"""

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Window:
    """`rank` is its first one in the slabs; its rows are those of the segments `first` to `last`."""

    rank: int
    first: int
    last: int


@dataclass(frozen=True)
class Plan:
    """Windows in the order of rows, each of `window` ranks; and of each segment where its ranks begin among theirs, put
    one after another, and its place. Both are None for a segment without an adapter."""

    window: int
    windows: tuple[Window, ...]
    begins: tuple[int | None, ...]
    places: tuple[Place | None, ...]

    @property
    def ranks(self) -> int:
        """Of all windows."""
        return self.window * len(self.windows)


def make_plan(places: Sequence[Place | None], window: int = BOX) -> Plan:
    """The plan of segments whose adapters have these places; window is at least as large as each of them."""
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
            windows[-1] = Window(rank, windows[-1].first, segment)
        else:
            windows.append(Window(rank, segment, segment))
        begins.append((len(windows) - 1) * window + place.rank - rank)
        before = rank
    return Plan(window, tuple(windows), tuple(begins), tuple(places))
