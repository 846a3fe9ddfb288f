"""Gradients of the factors, dA = dxa^T dropout(x) and dB = dy^T xa: sums over all tokens, cut into slices of tokens.

The tiles of both products form one list. On Hopper the expand kernel of dx works through it between its own
tiles (they are short of memory traffic, these of arithmetic); elsewhere the list is a grid of its own.
"""

from dataclasses import dataclass
from math import ceil

import torch
import triton
import triton.language as tl

from . import tiles
from .dropout import Dropout, keep_mask
from .launch import launch, operand, tma_ready
from .primitives import load_tile, store_tile
from .reduce_splits import reduce_splits
from .tiles import Gpu, Tile


@triton.jit
def _factor_grad_tile(
    big, low, grad, seed, threshold,
    tile, M, C, R, m_per_split,
    stride_big_row, stride_big_col, stride_low_row, stride_low_col,
    stride_grad_split, stride_grad_col, stride_grad_rank,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    DROPOUT: tl.constexpr, BIG_TMA: tl.constexpr, LOW_TMA: tl.constexpr, PRECISION: tl.constexpr,
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
        b = load_tile(big, m, col, M, C, stride_big_row, stride_big_col, BLOCK_T, BLOCK_C, BIG_TMA)
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
    DROPOUT: tl.constexpr, TMA: tl.constexpr, LOW_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile number `tile` of the list: those of dA first, then those of dB."""
    if tile < dA_tiles:
        _factor_grad_tile(
            x, dxa, dA, seed, threshold, tile, M, K, R, dA_m_per_split,
            stride_x_row, stride_x_col, stride_dxa_row, stride_dxa_col, stride_dA_split, stride_dA_col, stride_dA_row,
            BLOCK_C, BLOCK_R, BLOCK_T, DROPOUT, TMA, LOW_TMA, PRECISION,
        )  # fmt: skip
    else:
        _factor_grad_tile(
            dy, xa, dB, 0, 0, tile - dA_tiles, M, N, R, dB_m_per_split,
            stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
            BLOCK_C, BLOCK_R, BLOCK_T, False, TMA, LOW_TMA, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["threshold"])
def factor_grads_kernel(
    x, dxa, dA, dA_tiles, dA_m_per_split, dy, xa, dB, dB_m_per_split, seed_ptr, threshold,
    M, N, K, R,
    stride_x_row, stride_x_col, stride_dxa_row, stride_dxa_col, stride_dA_split, stride_dA_row, stride_dA_col,
    stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
    BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
    DROPOUT: tl.constexpr, TMA: tl.constexpr, LOW_TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of the list."""
    seed = tl.load(seed_ptr) if DROPOUT else 0
    factor_grad_tile(
        tl.program_id(0), x, dxa, dA, dA_tiles, dA_m_per_split, dy, xa, dB, dB_m_per_split, seed, threshold,
        M, N, K, R,
        stride_x_row, stride_x_col, stride_dxa_row, stride_dxa_col, stride_dA_split, stride_dA_row, stride_dA_col,
        stride_dy_row, stride_dy_col, stride_xa_row, stride_xa_col, stride_dB_split, stride_dB_row, stride_dB_col,
        BLOCK_C, BLOCK_R, BLOCK_T, DROPOUT, TMA, LOW_TMA, PRECISION,
    )  # fmt: skip


@dataclass(frozen=True)
class SplitGrad:
    """A factor's gradient in slices of tokens: `parts` is the fp32 workspace, or the gradient itself if uncut."""

    grad: torch.Tensor
    parts: torch.Tensor
    tile_count: int
    m_per_split: int

    @classmethod
    def plan(cls, factor, M: int, C: int, r: int, tile: Tile, gpu: Gpu) -> "SplitGrad":
        per_split = ceil(C / tile.block_m) * ceil(r / tile.block_n)
        # dA and dB are one launch and occupy every SM together.
        splits, m_per_split = tiles.split(M, tile.block_k, 2 * per_split, gpu)
        grad = torch.empty(factor.shape, dtype=factor.dtype, device=factor.device)
        parts = grad[None] if splits == 1 else grad.new_empty((splits, *grad.shape), dtype=torch.float32)
        return cls(grad, parts, per_split * splits, m_per_split)


def finish(*split_grads: SplitGrad):
    """Adds the slices up, in order."""
    cut = [(s.parts, s.grad) for s in split_grads if s.parts.shape[0] > 1]
    if cut:
        reduce_splits(*cut)


def factor_grads(x, dxa, A, dy, xa, B, dropout: Dropout, gpu: Gpu, precision: str, needs: tuple[bool, bool]):
    """(dA, dB) in the dtypes of A and B, from one launch and its reduction; None where not needed."""
    M, K = x.shape
    N, r = B.shape
    tile = tiles.factor_grad_tile(r, gpu, x.element_size(), precision)
    dA = SplitGrad.plan(A, M, K, r, tile, gpu) if needs[0] else None
    dB = SplitGrad.plan(B, M, N, r, tile, gpu) if needs[1] else None
    wanted = [g for g in (dA, dB) if g is not None]
    a, b = dA or dB, dB or dA  # an unwanted product has no tiles; its arguments only fill the signature
    dxa = xa if dxa is None else dxa
    tma = tma_ready(x, gpu) and tma_ready(dy, gpu)
    low_tma = tma and tma_ready(xa, gpu) and tma_ready(dxa, gpu)
    big_block, low_block = (tile.block_k, tile.block_m), (tile.block_k, tile.block_n)
    launch(
        factor_grads_kernel,
        (sum(g.tile_count for g in wanted),),
        (
            operand(x, big_block, tma), operand(dxa, low_block, low_tma), a.parts, dA.tile_count if dA else 0,
            a.m_per_split, operand(dy, big_block, tma), operand(xa, low_block, low_tma), b.parts, b.m_per_split,
            dropout.seed, dropout.threshold, M, N, K, r,
            *x.stride(), *dxa.stride(), *a.parts.stride(), *dy.stride(), *xa.stride(), *b.parts.stride(),
        ),
        dict(
            BLOCK_C=tile.block_m, BLOCK_R=tile.block_n, BLOCK_T=tile.block_k, DROPOUT=dropout.active,
            TMA=tma, LOW_TMA=low_tma, PRECISION=precision, num_warps=tile.num_warps, num_stages=tile.num_stages,
        ),
    )  # fmt: skip
    finish(*wanted)
    return dA and dA.grad, dB and dB.grad
