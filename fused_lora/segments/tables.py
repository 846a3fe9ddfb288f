"""The tables of a division of rows into segments, on the device: nothing here asks the device for a number.

    blocks   (blocks, 4)         of each 256 rows: its first window, its first box of low, and its first and last slice
                                 of 16 ranks, counted from that window on; the same two where no row has an adapter
    windows  (windows, 4)        the first rank in the slabs, the first row and the one behind the last, 0
    rows     (256 blocks, 2)     the first slice, counted from the first window on, and behind 24 bits how many;
                                 and the slice of the slabs in which the place begins

low has, of each block, the ranks of its windows in boxes of 64 ranks and 256 rows.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import BLOCK, BOX, SLICE, Plan


class Tables(NamedTuple):
    """int32, on the device of x."""

    blocks: Tensor
    windows: Tensor
    rows: Tensor


class Constants(NamedTuple):
    """What a plan says, on a device. words and slices are of each segment, and of rows behind the last one."""

    words: Tensor
    slices: Tensor
    ranks: Tensor
    first: Tensor
    last: Tensor


@lru_cache(maxsize=256)
def constants(plan: Plan, device: torch.device) -> Constants:
    """Copied without waiting for the device; not while a CUDA graph is captured."""
    each = list(zip(plan.begins, plan.places, strict=True))
    words = [0 if place is None else begin // SLICE | place.size // SLICE << 24 for begin, place in each]
    slices = [0 if place is None else place.rank // SLICE for place in plan.places]
    return Constants(
        _on(device, [*words, 0]),
        _on(device, [*slices, 0]),
        _on(device, [window.rank for window in plan.windows]),
        _on(device, [window.first for window in plan.windows]),
        _on(device, [window.last for window in plan.windows]),
    )


def _on(device: torch.device, values: Sequence[int]) -> Tensor:
    host = torch.tensor(values, dtype=torch.int32)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def tables(plan: Plan, of: Constants, ends: Tensor, M: int) -> Tables:
    """Of M rows, segment i of which ends before row ends[i] (int32, on the device, none smaller than the one before).
    Rows behind the last segment have no adapter."""
    blocks, slices = -(-M // BLOCK), plan.window // SLICE
    ends = ends.clamp(max=M)
    begins = torch.cat([ends.new_zeros(1), ends[:-1]])
    segment = torch.searchsorted(ends, torch.arange(blocks * BLOCK, device=ends.device, dtype=torch.int32), right=True)
    rows = torch.stack([of.words[segment], of.slices[segment]], 1)

    begin, end = begins[of.first], ends[of.last]
    windows = torch.stack([of.ranks, begin, end, torch.zeros_like(begin)], 1)

    # The first window that ends in or behind a block, or that has no rows and would begin there.
    first_rows = torch.arange(blocks, device=ends.device, dtype=torch.int32) * BLOCK
    keys = 2 * end + (begin == end)
    window = torch.searchsorted(keys, 2 * first_rows, right=True, out_int32=True)
    first = (rows[:, 0] & 0xFFFFFF).view(blocks, BLOCK) - slices * window[:, None]
    count = (rows[:, 0] >> 24).view(blocks, BLOCK)
    own = count > 0
    low = torch.where(own, first, 2**24).amin(1)
    high = torch.where(own, first + count, 0).amax(1)
    low = torch.where(high > 0, low, 0)
    boxes = (high + slices - 1) // slices * (plan.window // BOX)
    before = (boxes.cumsum(0, dtype=torch.int32) - boxes).to(torch.int32)
    return Tables(torch.stack([window, before, low, high], 1), windows, rows)
