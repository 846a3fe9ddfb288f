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
def store_dense_tile(
    dst, value, row, col, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, stride=None
):  # fmt: skip
    """As store_tile, into a freshly allocated (rows, cols), or into columns of one that is `stride` wide: offsets
    inside of a tile fit 32 bits."""
    stride_row = cols if stride is None else stride
    offs_row, offs_col = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLS)
    mask = (offs_row < rows - row)[:, None] & (offs_col < cols - col)[None, :]
    dst += tl.cast(row, tl.int64) * stride_row + col
    tl.store(dst + (offs_row[:, None] * stride_row + offs_col[None, :]), value.to(dst.dtype.element_ty), mask=mask)


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
def _wrap(first, size, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The indices of a block, those beyond size counted from 0 again: loads of them need no mask."""
    offsets = (first + tl.arange(0, BLOCK)) % size
    return offsets.to(tl.int64) if WIDE else offsets


@triton.jit
def in_eights(size, EIGHTS: tl.constexpr):
    """The same number of columns, or stride of rows, known as a multiple of 8 elements, 16 bytes, where EIGHTS promises
    it. (Numbers of rows are not promised.)

    By itself Triton asks for multiples of 16 only, and reads rows of 24 or of 1000 two bytes at a time.
    """
    return size // 8 * 8 if EIGHTS else size


@triton.jit
def accumulate_strided(
    acc, lhs, rhs, row, col, rows, cols, k_begin, k_end,
    stride_lhs_row, stride_lhs_k, stride_rhs_k, stride_rhs_col, seed, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, WIDE: tl.constexpr, DROPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + lhs[row:, k] @ rhs[k, col:] for k from k_begin to k_end, both operands pointers of any stride.

    Entries of acc beyond (rows, cols) are of no use. EVEN_K: the range is a multiple of BLOCK_K. WIDE: an offset may
    pass 2^31. DROPPED names the operand that dropout masks, if any: "lhs" as (row, k), "rhs" as (k, col).

    One scalar a step advances each operand, so that an address costs one addition and one register an access: with
    256x128x64 on 8 warps 224 to 240 instructions go with 128 products, 241 to 258 where tensors of pointers advance.
    """
    offs_m = _wrap(row, rows, BLOCK_M, WIDE)
    offs_n = _wrap(col, cols, BLOCK_N, WIDE)
    steps_k = tl.arange(0, BLOCK_K)
    offs_k = steps_k.to(tl.int64) if WIDE else steps_k
    lhs_offsets = offs_m[:, None] * stride_lhs_row + offs_k[None, :] * stride_lhs_k
    rhs_offsets = offs_k[:, None] * stride_rhs_k + offs_n[None, :] * stride_rhs_col
    lhs_stride, rhs_stride = tl.cast(stride_lhs_k, tl.int64), tl.cast(stride_rhs_k, tl.int64)
    lhs += k_begin * lhs_stride
    rhs += k_begin * rhs_stride
    for k in tl.range(k_begin, k_end, BLOCK_K):
        if EVEN_K:
            a = tl.load(lhs + lhs_offsets)
            b = tl.load(rhs + rhs_offsets)
        else:
            inside = steps_k < k_end - k
            a = tl.load(lhs + lhs_offsets, mask=inside[None, :], other=0.0)
            b = tl.load(rhs + rhs_offsets, mask=inside[:, None], other=0.0)
        if DROPPED == "lhs":
            a = tl.where(keep_mask(seed, row, k, threshold, BLOCK_M, BLOCK_K), a, 0.0)
        if DROPPED == "rhs":
            b = tl.where(keep_mask(seed, k, col, threshold, BLOCK_K, BLOCK_N), b, 0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        lhs += BLOCK_K * lhs_stride
        rhs += BLOCK_K * rhs_stride
    return acc


@triton.jit
def from_first(col, first_col):
    """The column of the whole result that a column of out is."""
    return col if first_col is None else first_col + col


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
