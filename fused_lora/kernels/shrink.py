"""Down to rank r: low = scale * dropout(lhs) @ factor, for xa (lhs x, factor A) and dxa (lhs dy, factor B)."""

from math import ceil

import torch
import triton
import triton.language as tl

from . import launch, tiles
from .dropout import Dropout
from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import accumulate, accumulate_strided, in_eights, store_tile
from .reduce_splits import reduce_splits
from .tiles import Gpu


@triton.jit(do_not_specialize=["threshold"])
def shrink_kernel(
    lhs, factor, low, scale_ptr, seed_ptr, keep_scale, threshold,
    M, R, K, k_per_split,
    stride_lhs_row, stride_lhs_col, stride_factor_row, stride_factor_col,
    stride_low_split, stride_low_row, stride_low_col,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RHS_T: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, FACTOR_TMA: tl.constexpr,
    EVEN_K: tl.constexpr, EIGHTS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles in the order (slice of K, rows, columns of r); with slices, low is the (slices, M, r) fp32 workspace.

    Persistent under TMA, its loops flattened so that the next tile's loads overlap this one's end:
    (32768, 1024, r = 128) on an H100, 35 us with a grid of tiles, 32 us so.
    """
    R, K = in_eights(R, EIGHTS and not RHS_T), in_eights(K, EIGHTS)
    stride_lhs_row, stride_factor_row = in_eights(stride_lhs_row, EIGHTS), in_eights(stride_factor_row, EIGHTS)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale = tl.load(scale_ptr).to(tl.float32) * keep_scale
    blocks_r = tl.cdiv(R, BLOCK_N)
    blocks = tl.cdiv(M, BLOCK_M) * blocks_r
    for tile in tl.range(tl.program_id(0), blocks * tl.cdiv(K, k_per_split), tl.num_programs(0), flatten=TMA):
        split = tile // blocks
        row, col = tile % blocks // blocks_r * BLOCK_M, tile % blocks_r * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if TMA or FACTOR_TMA:
            acc = accumulate(
                acc, lhs, factor, row, col, M, R, K, split * k_per_split, k_per_split,
                stride_lhs_row, stride_lhs_col, stride_factor_row, stride_factor_col, seed, threshold,
                BLOCK_M, BLOCK_N, BLOCK_K, RHS_T, DROPOUT, TMA, FACTOR_TMA, PRECISION,
            )  # fmt: skip
        else:
            acc = accumulate_strided(
                acc, lhs, factor, row, col, M, R, split * k_per_split, tl.minimum((split + 1) * k_per_split, K),
                stride_lhs_row, stride_lhs_col, stride_factor_col if RHS_T else stride_factor_row,
                stride_factor_row if RHS_T else stride_factor_col, seed, threshold,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, WIDE, "lhs" if DROPOUT else "", PRECISION,
            )  # fmt: skip
        # The scale enters here only: in fp32, before the one rounding.
        store_tile(
            low + split.to(tl.int64) * stride_low_split, acc * scale, row, col, M, R, stride_low_row, stride_low_col,
            BLOCK_M, BLOCK_N, False,
        )  # fmt: skip


def shrink(lhs, factor, scale, keep_scale, dropout: Dropout, gpu: Gpu, precision: str, *, rhs_t: bool):
    """low = scale * keep_scale * dropout(lhs) @ factor (factor^T with rhs_t), rounded once to lhs's dtype."""
    key = (Layout.of(lhs), Layout.of(factor), dropout.active, gpu, precision, rhs_t)
    splits, plan = planned((shrink, *key, *pointers_aligned(scale, dropout.seed)), lambda: _plan(*key))
    M, r = lhs.shape[0], factor.shape[0 if rhs_t else 1]
    low = torch.empty(M, r, dtype=lhs.dtype, device=lhs.device)
    out = low if splits == 1 else torch.empty(splits, M, r, dtype=torch.float32, device=lhs.device)
    plan.run((lhs, factor), (out, scale, dropout.seed, keep_scale, dropout.threshold))
    if splits > 1:
        reduce_splits((out, low))
    return low


def _plan(lhs: Layout, factor: Layout, dropout: bool, gpu: Gpu, precision: str, rhs_t: bool) -> tuple[int, Plan]:
    """(slices of K, launch)."""
    M, K, r = lhs.rows, lhs.cols, factor.rows if rhs_t else factor.cols
    tile = tiles.shrink_tile(r, gpu, lhs.dtype.itemsize, precision)
    blocks = ceil(M / tile.block_m) * ceil(r / tile.block_n)
    split = tiles.split_to_fill if gpu.has_mma_sync else tiles.split
    splits, k_per_split = split(K, tile.block_k, blocks, gpu)
    tma, factor_tma = lhs.tma_ready(gpu), factor.tma_ready(gpu)
    strided = not (tma or factor_tma)
    factor_block = (tile.block_n, tile.block_k) if rhs_t else (tile.block_k, tile.block_n)
    return splits, Plan(
        shrink_kernel,
        (min(blocks * splits, gpu.sm_count) if tma else blocks * splits, 1, 1),
        dict(
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, RHS_T=rhs_t, DROPOUT=dropout,
            TMA=tma, FACTOR_TMA=factor_tma, EVEN_K=strided and K % tile.block_k == 0,
            EIGHTS=strided and launch.only_in_eights(lhs, factor), WIDE=strided and launch.is_wide(lhs, factor),
            PRECISION=precision,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        ((tile.block_m, tile.block_k) if tma else None, factor_block if factor_tma else None),
        (M, r, K, k_per_split, *lhs.strides, *factor.strides, M * r, r, 1),
    )  # fmt: skip
