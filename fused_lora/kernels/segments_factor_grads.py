"""Gradients of the factors, of each window's ranks over its own rows: dA = dxa^T dropout(x) and
dB^T = xa^T dy.

The tiles of both products form one list: slices of a window's rows, windows, boxes of their ranks, columns.
"""

from math import ceil

import torch
import triton
import triton.language as tl

from ..segments import BOX, SLICE, Drops, Tables
from . import launch, tiles
from .dropout import keep_mask
from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import in_eights
from .reduce_splits import reduce_splits
from .segment_tables import NOTHING, block_of, low_rows, thresholds_of, window_of
from .tiles import Gpu


@triton.jit
def _grad_tile(
    big, low, grad, blocks_ptr, windows_ptr, rows_ptr, seed_ptr, thresholds_ptr, tile, C, windows, blocks, splits,
    stride_big_row, stride_big_col,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BOXES: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    RANKS: tl.constexpr = BOX, SIZE: tl.constexpr = SLICE,
):  # fmt: skip
    """grad[split, rank:, col:] = sum over one slice of a window's rows of low[m, rank:] dropout(big)[m, col:]."""
    across = tl.cdiv(C, BLOCK_C)
    col, box_of_all = tile % across * BLOCK_C, tile // across % (windows * BOXES)
    split = tile // (across * windows * BOXES)
    window, box_of_window = box_of_all // BOXES, box_of_all % BOXES
    begin, end, level = window_of(windows_ptr, window)
    # Steps begin at multiples of their size, so that one has rows of one block.
    first, last = begin // BLOCK_T, tl.cdiv(end, BLOCK_T)
    steps = tl.cdiv(tl.maximum(last - first, 0), splits)
    tokens, ranks, columns = tl.arange(0, BLOCK_T), tl.arange(0, RANKS), col + tl.arange(0, BLOCK_C)
    if WIDE:
        columns = columns.to(tl.int64)
    acc = tl.zeros((RANKS, BLOCK_C), dtype=tl.float32)
    for step in tl.range(first + split * steps, tl.minimum(first + (split + 1) * steps, last)):
        row = step * BLOCK_T
        first_window, low_box, first_slice, last_slice = block_of(blocks_ptr, blocks, level, row)
        box = (window - first_window) * BOXES + box_of_window
        slices = (box * RANKS + ranks) // SIZE
        inside = (row + tokens >= begin) & (row + tokens < end)
        written = (slices >= first_slice) & (slices < last_slice)
        places = low_rows(low_box + box, row, BLOCK_T)[:, None] + ranks[None, :]
        a = tl.load(low + places, mask=inside[:, None] & written[None, :], other=0.0)
        at = tl.cast(row, tl.int64) * stride_big_row
        offsets = (tokens.to(tl.int64) if WIDE else tokens)[:, None] * stride_big_row + columns[
            None, :
        ] * stride_big_col
        b = tl.load(big + at + offsets, mask=inside[:, None] & (columns < C)[None, :], other=0.0)
        if DROPOUT:
            thresholds = thresholds_of(thresholds_ptr, rows_ptr, blocks, level, row, BLOCK_T)
            b = tl.where(keep_mask(tl.load(seed_ptr) + level, row, col, thresholds, BLOCK_T, BLOCK_C), b, 0.0)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    places = ((split * windows * BOXES + box_of_all) * RANKS + ranks).to(tl.int64)[:, None] * C + columns[None, :]
    tl.store(grad + places, acc.to(grad.dtype.element_ty), mask=(columns < C)[None, :])


@triton.jit
def segments_factor_grads_kernel(
    x, dxa, dy, xa, dA, dB, blocks_ptr, windows_ptr, rows_ptr, seed_ptr, thresholds_ptr,
    dA_tiles, K, N, windows, blocks, splits, stride_x_row, stride_x_col, stride_dy_row, stride_dy_col,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BOXES: tl.constexpr, DROPOUT: tl.constexpr, EIGHTS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of the list: those of dA first, then those of dB."""
    K, N = in_eights(K, EIGHTS), in_eights(N, EIGHTS)
    stride_x_row, stride_dy_row = in_eights(stride_x_row, EIGHTS), in_eights(stride_dy_row, EIGHTS)
    tile = tl.program_id(0)
    if tile < dA_tiles:
        _grad_tile(
            x, dxa, dA, blocks_ptr, windows_ptr, rows_ptr, seed_ptr, thresholds_ptr, tile, K, windows, blocks, splits,
            stride_x_row, stride_x_col, BLOCK_C, BLOCK_T, BOXES, DROPOUT, WIDE, PRECISION,
        )  # fmt: skip
    else:
        _grad_tile(
            dy, xa, dB, blocks_ptr, windows_ptr, rows_ptr, seed_ptr, thresholds_ptr, tile - dA_tiles, N, windows,
            blocks, splits, stride_dy_row, stride_dy_col, BLOCK_C, BLOCK_T, BOXES, False, WIDE, PRECISION,
        )  # fmt: skip


def segments_factor_grads(
    x, dxa, dy, xa, dtypes, tables: Tables, window: int, drops: Drops | None, gpu: Gpu, precision: str,
    needs: tuple[bool, bool],
):  # fmt: skip
    """(dA (ranks, K), dB^T (ranks, N)) of the windows' ranks in these dtypes, None where needs says so."""
    count = tables.windows.shape[0]
    key = (Layout.of(x), Layout.of(dy), tables.blocks.shape[1], count, window, drops is not None, gpu, precision, needs)
    alignment = pointers_aligned(dxa, xa, *tables, *(drops or NOTHING))
    splits, plan = planned((segments_factor_grads, *key, *dtypes, *alignment), lambda: _plan(*key))
    shapes = ((window * count, big.shape[1]) if needed else (0, 0) for big, needed in zip((x, dy), needs, strict=True))
    grads = [torch.empty(*shape, dtype=dtype, device=x.device) for shape, dtype in zip(shapes, dtypes, strict=True)]
    places = grads
    if splits > 1:
        places = [torch.empty(splits, *grad.shape, dtype=torch.float32, device=x.device) for grad in grads]
    plan.run((x, xa if dxa is None else dxa, dy, xa), (*places, *tables, *(drops or NOTHING)))
    if splits > 1:
        reduce_splits(*(pair for pair, needed in zip(zip(places, grads, strict=True), needs, strict=True) if needed))
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _plan(
    x: Layout,
    dy: Layout,
    blocks: int,
    windows: int,
    window: int,
    drops: bool,
    gpu: Gpu,
    precision: str,
    needs: tuple[bool, bool],
) -> tuple[int, Plan]:
    """(slices of a window's rows, launch). How many rows a window has is not known here: as many as the others."""
    K, N, boxes = x.cols, dy.cols, windows * (window // BOX)
    tile = tiles.factor_grad_tile(BOX, gpu, x.dtype.itemsize, precision)
    dA_tiles, dB_tiles = (
        boxes * ceil(cols / tile.block_m) if needed else 0 for cols, needed in zip((K, N), needs, strict=True)
    )
    splits, _ = tiles.split(ceil(x.rows / windows), tile.block_k, dA_tiles + dB_tiles, gpu)
    return splits, Plan(
        segments_factor_grads_kernel,
        (splits * (dA_tiles + dB_tiles), 1, 1),
        dict(
            BLOCK_C=tile.block_m, BLOCK_T=tile.block_k, BOXES=window // BOX, DROPOUT=drops,
            EIGHTS=launch.only_in_eights(x, dy), WIDE=launch.is_wide(x, dy), PRECISION=precision,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        (None,) * 4,
        (splits * dA_tiles, K, N, windows, blocks, splits, *x.strides, *dy.strides),
    )  # fmt: skip
