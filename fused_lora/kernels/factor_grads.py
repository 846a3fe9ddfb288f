"""Gradients of the factors, dA = dxa^T dropout(x) and dB = dy^T xa: sums over all tokens, cut into slices of tokens.

The tiles of both products form one list. On Hopper the expand kernel of dx works through it between its own
tiles (they are short of memory traffic, these of arithmetic); elsewhere the list is a grid of its own.
"""

from dataclasses import dataclass
from math import ceil

import torch
import triton
import triton.language as tl

from . import launch, tiles
from .dropout import Dropout, keep_mask
from .launch import Layout, Plan, planned, pointers_aligned
from .primitives import accumulate_strided, in_eights, load_tile, row_order, store_dense_tile, store_tile
from .reduce_splits import reduce_splits
from .tiles import Gpu, Tile


@triton.jit
def _factor_grad_tile(
    big, low, grad, seed, threshold,
    tile, M, C, R, m_per_split,
    stride_big_row, stride_big_col, stride_low_row, stride_low_col,
    stride_grad_split, stride_grad_col, stride_grad_rank,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    DROPOUT: tl.constexpr, LOW_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad[split, col:, rank:] = sum over the tokens of one slice of dropout(big)[m, col:] low[m, rank:]."""
    ranks = tl.cdiv(R, BLOCK_R)
    per_split = tl.cdiv(C, BLOCK_C) * ranks
    split = tile // per_split
    col = (tile % per_split) // ranks * BLOCK_C
    rank = (tile % per_split) % ranks * BLOCK_R
    m_begin = split * m_per_split
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for m in tl.range(m_begin, min(m_begin + m_per_split, M), BLOCK_T):
        b = load_tile(big, m, col, M, C, stride_big_row, stride_big_col, BLOCK_T, BLOCK_C, True)
        if DROPOUT:
            b = tl.where(keep_mask(seed, m, col, threshold, BLOCK_T, BLOCK_C), b, 0.0)
        a = load_tile(low, m, rank, M, R, stride_low_row, stride_low_col, BLOCK_T, BLOCK_R, LOW_TMA)
        acc = tl.dot(b.T, a, acc, input_precision=PRECISION)
    grad += split.to(tl.int64) * stride_grad_split
    store_tile(grad, acc, col, rank, C, R, stride_grad_col, stride_grad_rank, BLOCK_C, BLOCK_R, False)


@triton.jit
def factor_grad_tile(
    tile, x, dxa, dA, dA_tiles, dA_m_per_split, dy, xa, dB, dB_m_per_split, seed, threshold,
    M, N, K, R,
    stride_x_row, stride_x_col, stride_dxa_row, stride_dxa_col, stride_dA_split, stride_dA_row, stride_dA_col,
    stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    DROPOUT: tl.constexpr, LOW_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of the list: those of dA first, then those of dB. x and dy are descriptors."""
    if tile < dA_tiles:
        _factor_grad_tile(
            x, dxa, dA, seed, threshold, tile, M, K, R, dA_m_per_split,
            stride_x_row, stride_x_col, stride_dxa_row, stride_dxa_col, stride_dA_split, stride_dA_col, stride_dA_row,
            BLOCK_C, BLOCK_R, BLOCK_T, DROPOUT, LOW_TMA, PRECISION,
        )  # fmt: skip
    else:
        _factor_grad_tile(
            dy, xa, dB, 0, 0, tile - dA_tiles, M, N, R, dB_m_per_split,
            stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
            BLOCK_C, BLOCK_R, BLOCK_T, False, LOW_TMA, PRECISION,
        )  # fmt: skip


@triton.jit
def _strided_product(
    left, right, grad, seed, threshold, tile, M, rows, cols, m_per_split,
    stride_left_token, stride_left_col, stride_right_token, stride_right_col,
    stride_grad_split, stride_grad_row, stride_grad_col,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCK_T: tl.constexpr,
    EVEN_T: tl.constexpr, WIDE: tl.constexpr, DROPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad[split] = left^T right, summed over the tokens of one slice: one (rows, cols) tile of it."""
    blocks = tl.cdiv(rows, BLOCK_ROWS) * tl.cdiv(cols, BLOCK_COLS)
    split = tile // blocks
    row, col = row_order(tile % blocks, cols, BLOCK_ROWS, BLOCK_COLS)
    m_begin = split * m_per_split
    acc = accumulate_strided(
        tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype=tl.float32), left, right, row, col, rows, cols,
        m_begin, tl.minimum(m_begin + m_per_split, M),
        stride_left_col, stride_left_token, stride_right_token, stride_right_col, seed, threshold,
        BLOCK_ROWS, BLOCK_COLS, BLOCK_T, EVEN_T, WIDE, DROPPED, PRECISION,
    )  # fmt: skip
    grad += split.to(tl.int64) * stride_grad_split
    store_dense_tile(grad, acc, row, col, rows, cols, BLOCK_ROWS, BLOCK_COLS)


@triton.jit
def _strided_grad_tile(
    tile, x, dxa, dA, dA_tiles, dA_m_per_split, dy, xa, dB, dB_m_per_split, seed, threshold,
    M, N, K, R,
    stride_x_row, stride_x_col, stride_dxa_row, stride_dxa_col, stride_dA_split, stride_dA_row, stride_dA_col,
    stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    DROPOUT: tl.constexpr, EVEN_T: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As factor_grad_tile, by pointers of any stride."""
    if tile < dA_tiles:
        _strided_product(
            dxa, x, dA, seed, threshold, tile, M, R, K, dA_m_per_split,
            stride_dxa_row, stride_dxa_col, stride_x_row, stride_x_col, stride_dA_split, stride_dA_row, stride_dA_col,
            BLOCK_R, BLOCK_C, BLOCK_T, EVEN_T, WIDE, "rhs" if DROPOUT else "", PRECISION,
        )  # fmt: skip
    else:
        _strided_product(
            dy, xa, dB, 0, 0, tile - dA_tiles, M, N, R, dB_m_per_split,
            stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
            BLOCK_C, BLOCK_R, BLOCK_T, EVEN_T, WIDE, "", PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def factor_grads_kernel(
    x, dxa, dy, xa, dA, dB, seed_ptr, threshold,
    dA_tiles, dA_m_per_split, dB_m_per_split, M, N, K, R,
    stride_x_row, stride_x_col, stride_dxa_row, stride_dxa_col, stride_dA_split, stride_dA_row, stride_dA_col,
    stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    DROPOUT: tl.constexpr, TMA: tl.constexpr, LOW_TMA: tl.constexpr, EVEN_T: tl.constexpr, EIGHTS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of the list."""
    seed = tl.load(seed_ptr) if DROPOUT else 0
    if TMA:
        factor_grad_tile(
            tl.program_id(0), x, dxa, dA, dA_tiles, dA_m_per_split, dy, xa, dB, dB_m_per_split, seed, threshold,
            M, N, K, R,
            stride_x_row, stride_x_col, stride_dxa_row, stride_dxa_col, stride_dA_split, stride_dA_row, stride_dA_col,
            stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
            BLOCK_C, BLOCK_R, BLOCK_T, DROPOUT, LOW_TMA, PRECISION,
        )  # fmt: skip
    else:
        N, K, R = in_eights(N, EIGHTS), in_eights(K, EIGHTS), in_eights(R, EIGHTS)
        stride_x_row, stride_dxa_row = in_eights(stride_x_row, EIGHTS), in_eights(stride_dxa_row, EIGHTS)
        stride_dy_row, stride_xa_row = in_eights(stride_dy_row, EIGHTS), in_eights(stride_xa_row, EIGHTS)
        _strided_grad_tile(
            tl.program_id(0), x, dxa, dA, dA_tiles, dA_m_per_split, dy, xa, dB, dB_m_per_split, seed, threshold,
            M, N, K, R,
            stride_x_row, stride_x_col, stride_dxa_row, stride_dxa_col, stride_dA_split, stride_dA_row, stride_dA_col,
            stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
            BLOCK_C, BLOCK_R, BLOCK_T, DROPOUT, EVEN_T, WIDE, PRECISION,
        )  # fmt: skip


@dataclass(frozen=True)
class SplitGrad:
    """How the (rows, cols) gradient of one factor is cut into slices of tokens."""

    shape: tuple[int, int]
    splits: int
    m_per_split: int
    tile_count: int

    @classmethod
    def plan(cls, M: int, N: int, K: int, r: int, tile: Tile, gpu: Gpu, itemsize: int):
        """(dA, dB). They are one launch and occupy every SM together."""
        dA_blocks, dB_blocks = (ceil(C / tile.block_m) * ceil(r / tile.block_n) for C in (K, N))
        if gpu.has_mma_sync:
            # A slice is 4r / M of the operand's bytes, and L2 takes them faster than memory brings those.
            cost = tiles.SLICE_COST + 1.5 * r / M
            per_sm = tiles.blocks_per_sm(tile, gpu, itemsize)
            dA_cut = dB_cut = tiles.split(M, tile.block_k, dA_blocks + dB_blocks, gpu, per_sm, cost)
        else:
            dA_cut, dB_cut = (tiles.split(M, tile.block_k, 2 * blocks, gpu) for blocks in (dA_blocks, dB_blocks))
        return cls((r, K), *dA_cut, dA_blocks * dA_cut[0]), cls((N, r), *dB_cut, dB_blocks * dB_cut[0])

    @property
    def strides(self) -> tuple[int, int, int]:
        """Of the workspace (splits, rows, cols)."""
        rows, cols = self.shape
        return rows * cols, cols, 1

    def allocate(self, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(workspace, gradient): float32 slices and the factor's dtype, one and the same where uncut."""
        grad = torch.empty(self.shape, dtype=factor.dtype, device=factor.device)
        if self.splits == 1:
            return grad, grad
        return torch.empty(self.splits, *self.shape, dtype=torch.float32, device=factor.device), grad


def finish(*allocated: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Adds the slices up, in order."""
    cut = [(parts, grad) for parts, grad in allocated if parts is not grad]
    if cut:
        reduce_splits(*cut)


def factor_grads(x, dxa, A, dy, xa, B, dropout: Dropout, gpu: Gpu, precision: str, needs: tuple[bool, bool]):
    """(dA, dB) in the dtypes of A and B, from one launch and its reduction; None where not needed."""
    dxa = xa if dxa is None else dxa
    layouts = [Layout.of(matrix) for matrix in (x, dxa, dy, xa)]
    key = (*layouts, A.dtype, B.dtype, dropout.active, gpu, precision, needs)
    dA, dB, plan = planned((factor_grads, *key, *pointers_aligned(dropout.seed)), lambda: _plan(*key))
    dA_parts, dA_grad = dA.allocate(A) if needs[0] else (None, None)
    dB_parts, dB_grad = dB.allocate(B) if needs[1] else (None, None)
    # A product that is not needed has no tiles; its argument only fills the signature.
    outputs = (dB_parts if dA_parts is None else dA_parts, dA_parts if dB_parts is None else dB_parts)
    plan.run((x, dxa, dy, xa), (*outputs, dropout.seed, dropout.threshold))
    finish(*((parts, grad) for parts, grad in ((dA_parts, dA_grad), (dB_parts, dB_grad)) if grad is not None))
    return dA_grad, dB_grad


def _plan(
    x: Layout, dxa: Layout, dy: Layout, xa: Layout, A_dtype, B_dtype, dropout: bool, gpu: Gpu, precision: str, needs
) -> tuple[SplitGrad, SplitGrad, Plan]:
    M, K, N, r = x.rows, x.cols, dy.cols, xa.cols
    tile = tiles.factor_grad_tile(r, gpu, x.dtype.itemsize, precision)
    dA, dB = SplitGrad.plan(M, N, K, r, tile, gpu, x.dtype.itemsize)
    dA_tiles = dA.tile_count if needs[0] else 0
    tma = x.tma_ready(gpu) and dy.tma_ready(gpu)
    low_tma = tma and xa.tma_ready(gpu) and dxa.tma_ready(gpu)
    big_block = (tile.block_k, tile.block_m) if tma else None
    low_block = (tile.block_k, tile.block_n) if low_tma else None
    return dA, dB, Plan(
        factor_grads_kernel,
        (dA_tiles + (dB.tile_count if needs[1] else 0), 1, 1),
        dict(
            BLOCK_C=tile.block_m, BLOCK_R=tile.block_n, BLOCK_T=tile.block_k, DROPOUT=dropout,
            TMA=tma, LOW_TMA=low_tma, EVEN_T=not tma and M % tile.block_k == 0,
            EIGHTS=not tma and launch.only_in_eights(x, dxa, dy, xa), WIDE=not tma and launch.is_wide(x, dxa, dy, xa),
            PRECISION=precision, num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
        (big_block, low_block, big_block, low_block),
        (
            dA_tiles, dA.m_per_split, dB.m_per_split, M, N, K, r,
            *x.strides, *dxa.strides, *dA.strides, *dy.strides, *xa.strides, *dB.strides,
        ),
    )  # fmt: skip
