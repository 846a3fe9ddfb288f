"""Tile-level building blocks that every kernel shares: load, store, multiply-accumulate, tile order.

A matrix operand is either a pointer with its two strides or a host-made TMA descriptor; TMA is a
constexpr, so one kernel body serves Ampere's cp.async and Hopper's copy engine.
"""

import triton
import triton.language as tl

from .dropout import keep_mask


@triton.jit
def load_tile(
    src, row, col, rows, cols, stride_row, stride_col,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """src[row : row + BLOCK_ROWS, col : col + BLOCK_COLS], zero beyond (rows, cols)."""
    if TMA:
        return src.load([row, col])
    else:
        # int64 before the product: row * stride passes 2^31 on long or widely strided inputs.
        offs_row = row + tl.arange(0, BLOCK_ROWS)
        offs_col = col + tl.arange(0, BLOCK_COLS)
        offsets = offs_row.to(tl.int64)[:, None] * stride_row + offs_col.to(tl.int64)[None, :] * stride_col
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        return tl.load(src + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(
    dst, value, row, col, rows, cols, stride_row, stride_col,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dst[row : row + BLOCK_ROWS, col : col + BLOCK_COLS] = value, inside (rows, cols) only."""
    if TMA:
        dst.store([row, col], value.to(dst.dtype))
    else:
        offs_row = row + tl.arange(0, BLOCK_ROWS)
        offs_col = col + tl.arange(0, BLOCK_COLS)
        offsets = offs_row.to(tl.int64)[:, None] * stride_row + offs_col.to(tl.int64)[None, :] * stride_col
        mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        tl.store(dst + offsets, value.to(dst.dtype.element_ty), mask=mask)


@triton.jit
def accumulate(
    acc, lhs, rhs, row, col, rows, cols, depth, k_begin, k_count,
    stride_lhs_row, stride_lhs_col, stride_rhs_row, stride_rhs_col,
    seed, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RHS_T: tl.constexpr, DROPOUT: tl.constexpr, LHS_TMA: tl.constexpr, RHS_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + dropout(lhs)[row:, k] @ rhs[k, col:] for k_count values of k from k_begin, those beyond depth being zero.

    lhs is (rows, depth); rhs is (depth, cols), or (cols, depth) as nn.Linear stores it with RHS_T.
    """
    for offset in tl.range(0, k_count, BLOCK_K):
        k = k_begin + offset
        a = load_tile(lhs, row, k, rows, depth, stride_lhs_row, stride_lhs_col, BLOCK_M, BLOCK_K, LHS_TMA)
        if RHS_T:
            b = load_tile(rhs, col, k, cols, depth, stride_rhs_row, stride_rhs_col, BLOCK_N, BLOCK_K, RHS_TMA).T
        else:
            b = load_tile(rhs, k, col, depth, cols, stride_rhs_row, stride_rhs_col, BLOCK_K, BLOCK_N, RHS_TMA)
        if DROPOUT:
            a = tl.where(keep_mask(seed, row, k, threshold, BLOCK_M, BLOCK_K), a, 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def row_order(tile, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """(row, col) of a tile, walking along the rows of tiles."""
    blocks = tl.cdiv(cols, BLOCK_COLS)
    return tile // blocks * BLOCK_ROWS, tile % blocks * BLOCK_COLS


@triton.jit
def grouped_order(tile, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, col) of a tile, walking down groups of GROUP_M row blocks so that a wave shares both operands in L2."""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    blocks_n = tl.cdiv(cols, BLOCK_N)
    group = tile // (GROUP_M * blocks_n)
    first_m = group * GROUP_M
    height = min(blocks_m - first_m, GROUP_M)
    inside = tile % (GROUP_M * blocks_n)
    return (first_m + inside % height) * BLOCK_M, (inside // height) * BLOCK_N
