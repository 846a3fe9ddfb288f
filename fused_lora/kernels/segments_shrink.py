"""Down to each row's own ranks: low = scale * dropout(lhs) @ factor^T of its adapter, zeros of its block's
others."""

from math import ceil

import torch
import triton
import triton.language as tl

from ..segments import BLOCK, BOX, SLICE, Drops, Tables
from . import launch, tiles
from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import accumulate_strided, in_eights
from .segment_tables import NOTHING, block_of, low_rows, own_slices, place_of
from .tiles import Gpu


@triton.jit
def _shrink_ranks(
    lhs, factor, low, windows_ptr, row, slice_, window, low_box, first, count, scale, seed, thresholds, M, R, K,
    stride_lhs_row, stride_lhs_col, stride_factor_row, stride_factor_col,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BOXES: tl.constexpr, DROPOUT: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, SIZE: tl.constexpr = SLICE,
):  # fmt: skip
    """WIDTH ranks of a block from a slice on."""
    box, column, rank = place_of(slice_, window, windows_ptr, BOXES)
    acc = accumulate_strided(
        tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32), lhs, factor, row, rank, M, R, 0, K,
        stride_lhs_row, stride_lhs_col, stride_factor_col, stride_factor_row, seed, thresholds,
        BLOCK_M, WIDTH, BLOCK_K, EVEN_K, WIDE, "lhs" if DROPOUT else "", PRECISION,
    )  # fmt: skip
    ranks = tl.arange(0, WIDTH)
    offsets = (slice_ + ranks // SIZE)[None, :] - first[:, None]
    # What is chosen, since what is not may be no number.
    own = tl.where((offsets >= 0) & (offsets < count[:, None]), acc * scale[:, None], 0.0)
    places = low_rows(low_box + box, row, BLOCK_M)[:, None] + (column + ranks)[None, :]
    tl.store(low + places, own.to(low.dtype.element_ty))


@triton.jit
def segments_shrink_kernel(
    lhs, factor, low, scales_ptr, blocks_ptr, windows_ptr, rows_ptr, seed_ptr, thresholds_ptr,
    M, R, K, blocks,
    stride_lhs_row, stride_lhs_col, stride_factor_row, stride_factor_col,
    BLOCK_M: tl.constexpr, SLICE: tl.constexpr, BOX: tl.constexpr, BLOCK_K: tl.constexpr, BOXES: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_K: tl.constexpr, EIGHTS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program has some rows, on one level, and of their block's boxes every one that is its turn."""
    K = in_eights(K, EIGHTS)
    stride_lhs_row, stride_factor_row = in_eights(stride_lhs_row, EIGHTS), in_eights(stride_factor_row, EIGHTS)
    row, level = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    window, low_box, begin, end = block_of(blocks_ptr, blocks, level, row)
    first, count, places = own_slices(rows_ptr, blocks, level, row, window, BLOCK_M, BOXES)
    scale = tl.load(scales_ptr + places).to(tl.float32)
    seed = tl.load(seed_ptr) + level if DROPOUT else 0
    thresholds = tl.load(thresholds_ptr + places)[:, None] if DROPOUT else 0
    if end - begin == 1:  # a block of one small adapter
        if tl.program_id(2) == 0:
            _shrink_ranks(
                lhs, factor, low, windows_ptr, row, begin, window, low_box, first, count, scale, seed, thresholds, M, R,
                K, stride_lhs_row, stride_lhs_col, stride_factor_row, stride_factor_col,
                BLOCK_M, SLICE, BLOCK_K, BOXES, DROPOUT, EVEN_K, WIDE, PRECISION,
            )  # fmt: skip
    else:
        per_box = BOX // SLICE
        own = (begin // per_box + tl.program_id(2)) * per_box
        for slice_ in tl.range(own, end, per_box * tl.num_programs(2), num_stages=1):
            _shrink_ranks(
                lhs, factor, low, windows_ptr, row, slice_, window, low_box, first, count, scale, seed, thresholds, M,
                R, K, stride_lhs_row, stride_lhs_col, stride_factor_row, stride_factor_col,
                BLOCK_M, BOX, BLOCK_K, BOXES, DROPOUT, EVEN_K, WIDE, PRECISION,
            )  # fmt: skip


def segments_shrink(
    lhs, factor, scales, tables: Tables, window: int, drops: Drops | None, gpu: Gpu, precision: str
):  # fmt: skip
    """low = scale * dropout(lhs) @ factor^T of each row's adapter, rounded once to lhs's dtype: boxes of 64 ranks.

    lhs (M, depth)   factor (R, depth) a slab   scales (R / 16,) in float32   ->   low (boxes * 256, 64)
    """
    levels, blocks, windows = tables.blocks.shape[0], tables.blocks.shape[1], tables.windows.shape[0]
    key = (Layout.of(lhs), Layout.of(factor), levels, windows, window, drops is not None, gpu, precision)
    plan = planned(
        (segments_shrink, *key, *pointers_aligned(scales, *tables, *(drops or NOTHING))), lambda: _plan(*key)
    )
    boxes = window // BOX * (levels * (blocks - 1) + windows)
    low = torch.empty(boxes * BLOCK, BOX, dtype=lhs.dtype, device=lhs.device)
    plan.run((lhs, factor), (low, scales, *tables, *(drops or NOTHING)))
    return low


def _plan(
    lhs: Layout, factor: Layout, levels: int, windows: int, window: int, drops: bool, gpu: Gpu, precision: str
) -> Plan:  # fmt: skip
    M, K = lhs.rows, lhs.cols
    tile = tiles.shrink_tile(BOX, gpu, lhs.dtype.itemsize, precision)
    rows, boxes = ceil(M / tile.block_m), windows * (window // BOX)
    beside = max(1, min(boxes, 2 * gpu.sm_count // (rows * levels)))
    return Plan(
        segments_shrink_kernel,
        (rows, levels, beside),
        dict(
            BLOCK_M=tile.block_m, SLICE=SLICE, BOX=BOX, BLOCK_K=tile.block_k, BOXES=window // BOX,
            DROPOUT=drops, EVEN_K=K % tile.block_k == 0, EIGHTS=launch.only_in_eights(lhs, factor),
            WIDE=launch.is_wide(lhs, factor), PRECISION=precision, num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        (None, None),
        (M, factor.rows, K, ceil(M / BLOCK), *lhs.strides, *factor.strides),
    )  # fmt: skip
