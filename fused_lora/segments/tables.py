"""The tables of a division of rows into segments, on the device: nothing here asks the device for a number.

    blocks   (levels, blocks, 4)       of each 256 rows: the level's first window, its first box of low, and its first
                                       and last slice of 16 ranks, counted from that window on; the same two where no
                                       row has an adapter
    windows  (windows, 4)              of all levels: the first rank in the slabs, the first row and the one behind the
                                       last, the level
    rows     (levels, 256 blocks, 2)   the first slice, counted from the first window on, and behind 24 bits how many;
                                       and the slice of the slabs in which the place begins

low has, of each level and block, the ranks of its windows in boxes of 64 ranks and 256 rows.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import BLOCK, BOX, SLICE, Level, Plan


class Tables(NamedTuple):
    """int32, on the device of x."""

    blocks: Tensor
    windows: Tensor
    rows: Tensor


class Constants(NamedTuple):
    """What a plan says of a level, on a device. words and slices are of each segment, and of rows behind the last."""

    words: Tensor
    slices: Tensor
    ranks: Tensor
    first: Tensor
    last: Tensor


@lru_cache(maxsize=256)
def constants(plan: Plan, device: torch.device) -> tuple[Constants, ...]:
    """Of each level, as on_device has it."""
    return tuple(_constants(level, device) for level in plan.levels)


def _constants(level: Level, device: torch.device) -> Constants:
    each = list(zip(level.begins, level.places, strict=True))
    words = [0 if place is None else begin // SLICE | place.size // SLICE << 24 for begin, place in each]
    slices = [0 if place is None else place.rank // SLICE for place in level.places]
    return Constants(
        on_device(device, [*words, 0]),
        on_device(device, [*slices, 0]),
        *(on_device(device, [window[i] for window in level.windows]) for i in range(3)),
    )


def on_device(device: torch.device, values: Sequence[int]) -> Tensor:
    """int32, copied without waiting for the device, and not while a CUDA graph is captured."""
    host = torch.tensor(values, dtype=torch.int32, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def tables(plan: Plan, of: Sequence[Constants], ends: Tensor, M: int) -> Tables:
    """Of M rows, segment i of which ends before row ends[i] (int32, on the device, none smaller than the one before).
    Rows behind the last segment have no adapter."""
    ends = ends.clamp(max=M)
    count = -(-M // BLOCK)
    segment = torch.searchsorted(ends, torch.arange(count * BLOCK, device=ends.device, dtype=torch.int32), right=True)
    blocks, windows, rows = [], [], []
    passed, boxes = 0, ends.new_zeros(())  # windows and boxes of the levels before
    for number, level in enumerate(of):
        rows.append(torch.stack([level.words[segment], level.slices[segment]], 1))
        windows.append(_windows(level, ends, number))
        found, boxes = _blocks(plan.window, windows[-1], rows[-1], passed, boxes)
        blocks.append(found)
        passed += len(windows[-1])
    return Tables(torch.stack(blocks), torch.cat(windows), torch.stack(rows))


def _windows(of: Constants, ends: Tensor, level: int) -> Tensor:
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    begin = begins[of.first]
    return torch.stack([of.ranks, begin, ends[of.last], torch.full_like(begin, level)], 1)


def _blocks(window: int, windows: Tensor, rows: Tensor, passed: int, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """A level's table; and how many boxes of low there are up to its end."""
    slices, count = window // SLICE, len(rows) // BLOCK
    # The first window that ends in or behind a block, or that has no rows and would begin there.
    begin, end = windows[:, 1], windows[:, 2]
    first_rows = torch.arange(count, device=rows.device, dtype=torch.int32) * BLOCK
    first = passed + torch.searchsorted(2 * end + (begin == end), 2 * first_rows, right=True, out_int32=True)

    slice_ = (rows[:, 0] & 0xFFFFFF).view(count, BLOCK) - slices * first[:, None]
    number = (rows[:, 0] >> 24).view(count, BLOCK)
    high = torch.where(number > 0, slice_ + number, 0).amax(1)
    low = torch.where(high > 0, torch.where(number > 0, slice_, 2**24).amin(1), 0)
    own = (high + slices - 1) // slices * (window // BOX)
    up_to = boxes + own.cumsum(0, dtype=torch.int32)
    return torch.stack([first, up_to - own, low, high], 1), boxes + own.sum(dtype=torch.int32)
