"""Base and expand in one GEMM: out = lhs @ weight + dropout(low @ factor) + bias, of each row its own adapters'
ranks.

Forward: lhs x, weight W^T, factor the slab of B^T. Backward: lhs dy, weight W, factor the slab A, out dx.
"""

from math import ceil

import torch
import triton
import triton.language as tl

from ..segments import BLOCK, BOX, SLICE, Drops, Tables
from . import launch, tiles
from .dropout import keep_mask
from .expand import GROUP_M, finish_tile
from .launch import Layout, Plan, dense, planned, pointers_aligned
from .primitives import accumulate, accumulate_strided, from_first, grouped_order, in_eights
from .segment_tables import NOTHING, block_of, low_rows, place_of, thresholds_of
from .tiles import Gpu


@triton.jit
def _add_level(
    acc, low, factor, blocks_ptr, windows_ptr, row, col, N, R, level, blocks, stride_factor_row, stride_factor_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOXES: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr = SLICE,
):  # fmt: skip
    """acc + low @ factor: of the block that has the tile's rows, on a level, a slice a step."""
    ranks, columns = tl.arange(0, SIZE), col + tl.arange(0, BLOCK_N)
    if WIDE:
        ranks, columns = ranks.to(tl.int64), columns.to(tl.int64)
    offsets = ranks[:, None] * stride_factor_row + columns[None, :] * stride_factor_col
    window, low_box, begin, end = block_of(blocks_ptr, blocks, level, row)
    for slice_ in tl.range(begin, end, num_stages=1):
        box, column, rank = place_of(slice_, window, windows_ptr, BOXES)
        a = tl.load(low + low_rows(low_box + box, row, BLOCK_M)[:, None] + (column + ranks)[None, :])
        at = tl.cast(rank, tl.int64) * stride_factor_row
        b = tl.load(factor + at + offsets, mask=(ranks < R - rank)[:, None] & (columns < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _ranks(
    low, factor, blocks_ptr, windows_ptr, rows_ptr, seed_ptr, thresholds_ptr, first_col, row, col, N, R, levels, blocks,
    stride_factor_row, stride_factor_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BOXES: tl.constexpr, DROPOUT: tl.constexpr,
    ONE_LEVEL: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dropout(low @ factor): the sums of one level are masked themselves, those of several before they are added."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for level in range(1 if ONE_LEVEL else levels):
        own = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) if DROPOUT and not ONE_LEVEL else acc
        own = _add_level(
            own, low, factor, blocks_ptr, windows_ptr, row, col, N, R, level, blocks, stride_factor_row,
            stride_factor_col, BLOCK_M, BLOCK_N, BOXES, WIDE, PRECISION,
        )  # fmt: skip
        if DROPOUT:
            thresholds = thresholds_of(thresholds_ptr, rows_ptr, blocks, level, row, BLOCK_M)
            mask = keep_mask(tl.load(seed_ptr) + level, row, from_first(col, first_col), thresholds, BLOCK_M, BLOCK_N)
            own = tl.where(mask, own, 0.0)
        acc = acc + own if DROPOUT and not ONE_LEVEL else own
    return acc


@triton.jit(do_not_specialize=["first_col"])
def segments_expand_kernel(
    lhs, weight, out, low, factor, bias_ptr, blocks_ptr, windows_ptr, rows_ptr, seed_ptr, thresholds_ptr,
    first_col, M, N, K, R, levels, blocks,
    stride_lhs_row, stride_lhs_col, stride_weight_row, stride_weight_col, stride_factor_row, stride_factor_col,
    stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, BOXES: tl.constexpr,
    RHS_T: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, ONE_LEVEL: tl.constexpr, TMA: tl.constexpr,
    EVEN_K: tl.constexpr, EIGHTS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Persistent under TMA; without, one program a tile: in a loop over tiles the operands' addresses leave the
    registers. Tiles are not cut where segments end: only ranks know them. first_col and stride_out as expand's."""
    if TMA:
        for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
            row, col = grouped_order(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
            acc = _ranks(
                low, factor, blocks_ptr, windows_ptr, rows_ptr, seed_ptr, thresholds_ptr, first_col, row, col, N, R,
                levels, blocks, stride_factor_row, stride_factor_col,
                BLOCK_M, BLOCK_N, BOXES, DROPOUT, ONE_LEVEL, WIDE, PRECISION,
            )  # fmt: skip
            acc = accumulate(
                acc, lhs, weight, row, col, M, N, K, 0, K, 0, 1, 0, 1, 0, 0,
                BLOCK_M, BLOCK_N, BLOCK_K, RHS_T, False, True, True, PRECISION,
            )  # fmt: skip
            finish_tile(out, acc, None, bias_ptr, row, col, M, N, None, BLOCK_M, BLOCK_N, False, HAS_BIAS, True)
    else:
        N, K = in_eights(N, EIGHTS and not RHS_T), in_eights(K, EIGHTS)
        stride_lhs_row, stride_weight_row = in_eights(stride_lhs_row, EIGHTS), in_eights(stride_weight_row, EIGHTS)
        row, col = grouped_order(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = _ranks(
            low, factor, blocks_ptr, windows_ptr, rows_ptr, seed_ptr, thresholds_ptr, first_col, row, col, N, R,
            levels, blocks, stride_factor_row, stride_factor_col,
            BLOCK_M, BLOCK_N, BOXES, DROPOUT, ONE_LEVEL, WIDE, PRECISION,
        )  # fmt: skip
        acc = accumulate_strided(
            acc, lhs, weight, row, col, M, N, 0, K, stride_lhs_row, stride_lhs_col,
            stride_weight_col if RHS_T else stride_weight_row, stride_weight_row if RHS_T else stride_weight_col, 0, 0,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, WIDE, "", PRECISION,
        )  # fmt: skip
        finish_tile(out, acc, None, bias_ptr, row, col, M, N, stride_out, BLOCK_M, BLOCK_N, False, HAS_BIAS, False)


def segments_expand(
    lhs, weight, low, factor, bias, tables: Tables, window: int, drops: Drops | None, gpu: Gpu, precision: str, *,
    rhs_t: bool, out=None, first_col: int | None = None,
):  # fmt: skip
    """lhs @ weight (weight^T with rhs_t) + dropout(low @ factor) + bias.

    lhs (M, depth)   low as segments_shrink has it   factor (R, columns) a slab   ->   (M, columns)

    out and first_col as expand has them.
    """
    levels = tables.blocks.shape[0]
    layouts = [Layout.of(matrix) for matrix in (lhs, weight, factor)]
    key = (*layouts, levels, window, None if bias is None else bias.dtype, drops is not None, gpu, precision, rhs_t)
    key += (None if out is None else Layout.of(out),)
    plan = planned(
        (segments_expand, *key, first_col is None, *pointers_aligned(bias, low, *tables, *(drops or NOTHING))),
        lambda: _plan(*key),
    )
    if out is None:
        out = torch.empty(lhs.shape[0], weight.shape[0 if rhs_t else 1], dtype=lhs.dtype, device=lhs.device)
    plan.run((lhs, weight, out), (low, factor, bias, *tables, *(drops or NOTHING), first_col))
    return out


def _plan(
    lhs: Layout, weight: Layout, factor: Layout, levels: int, window: int, bias_dtype, drops: bool, gpu: Gpu,
    precision: str, rhs_t: bool, out: Layout | None,
) -> Plan:  # fmt: skip
    M, K, N = lhs.rows, lhs.cols, weight.rows if rhs_t else weight.cols
    out = dense(M, N, lhs) if out is None else out
    is_whole = out.stride_row == N
    tma = all(layout.tma_ready(gpu) for layout in (lhs, weight, out))
    large = launch.in_eights(lhs, weight) and (is_whole or not drops)  # as in expand
    of_kind = (gpu, lhs.dtype.itemsize, tma, precision, large)
    # There are no registers for two large tiles, of all levels and of the one that is masked.
    tile = tiles.expand_candidates(*of_kind)[-1] if drops and levels > 1 else tiles.expand_tile(M, N, *of_kind)
    tile_count = ceil(M / tile.block_m) * ceil(N / tile.block_n)
    weight_block = (tile.block_n, tile.block_k) if rhs_t else (tile.block_k, tile.block_n)
    blocks = ((tile.block_m, tile.block_k), weight_block, (tile.block_m, tile.block_n // 2)) if tma else (None,) * 3
    return Plan(
        segments_expand_kernel,
        (min(tile_count, gpu.sm_count) if tma else tile_count, 1, 1),
        dict(
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=GROUP_M, BOXES=window // BOX,
            RHS_T=rhs_t, HAS_BIAS=bias_dtype is not None, DROPOUT=drops, ONE_LEVEL=levels == 1, TMA=tma,
            EVEN_K=not tma and K % tile.block_k == 0, EIGHTS=not tma and launch.only_in_eights(lhs, weight),
            WIDE=launch.is_wide(lhs, weight, factor), PRECISION=precision,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        blocks,
        (
            M, N, K, factor.rows, levels, ceil(M / BLOCK), *lhs.strides, *weight.strides, *factor.strides,
            None if tma or is_whole else out.stride_row,
        ),
    )  # fmt: skip
