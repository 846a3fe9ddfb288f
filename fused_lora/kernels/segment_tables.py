"""What kernels read in the tables of segments (segments/tables.py), and where their low lies.

low has boxes of 256 rows and 64 ranks: of each level and block of rows those of its windows, one after another. Slices
of 16 ranks are counted from a block's first window on; those before its first and from its last on are neither written
nor read.
"""

import triton
import triton.language as tl

from ..segments import BLOCK, BOX, SLICE

NOTHING = (None, None)  # is dropped: neither seed nor thresholds


@triton.jit
def block_of(blocks_ptr, blocks, level, row, ROWS: tl.constexpr = BLOCK):
    """(first window, its first box of low, first slice, last slice) of the block that has a row. Without adapters the
    last two are the same."""
    entry = blocks_ptr + (level * blocks + row // ROWS) * 4
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def window_of(windows_ptr, window):
    """(first row, the one behind the last, level)."""
    entry = windows_ptr + window * 4
    return tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def place_of(slice_, window, windows_ptr, BOXES: tl.constexpr, RANKS: tl.constexpr = BOX, SIZE: tl.constexpr = SLICE):
    """(its box, its first column there, its first rank in the slabs) of a slice counted from a window on; a window has
    so many boxes."""
    box = slice_ // (RANKS // SIZE)
    column = slice_ * SIZE - box * RANKS
    first = tl.load(windows_ptr + (window + box // BOXES) * 4)
    return box, column, first + slice_ * SIZE - box // BOXES * (BOXES * RANKS)


@triton.jit
def _rows(rows_ptr, blocks, level, row, BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr = BLOCK):
    """The entries of some rows."""
    return rows_ptr + (tl.cast(level * blocks, tl.int64) * ROWS + row + tl.arange(0, BLOCK_ROWS)) * 2


@triton.jit
def own_slices(
    rows_ptr, blocks, level, row, window, BLOCK_M: tl.constexpr, BOXES: tl.constexpr,
    SLICES: tl.constexpr = BOX // SLICE,
):  # fmt: skip
    """(first slice, how many, the slice of the slabs in which the place begins) of each of some rows."""
    entries = _rows(rows_ptr, blocks, level, row, BLOCK_M)
    words, places = tl.load(entries), tl.load(entries + 1)
    return (words & 0xFFFFFF) - window * (BOXES * SLICES), words >> 24, places


@triton.jit
def thresholds_of(thresholds_ptr, rows_ptr, blocks, level, row, BLOCK_ROWS: tl.constexpr):
    """(rows, 1): which numbers each of some rows drops, by its adapter on a level."""
    return tl.load(thresholds_ptr + tl.load(_rows(rows_ptr, blocks, level, row, BLOCK_ROWS) + 1))[:, None]


@triton.jit
def low_rows(low_box, row, BLOCK_ROWS: tl.constexpr, ROWS: tl.constexpr = BLOCK, RANKS: tl.constexpr = BOX):
    """Offsets of some rows of a block in a box of low."""
    return (tl.cast(low_box, tl.int64) * ROWS + row % ROWS + tl.arange(0, BLOCK_ROWS)) * RANKS
