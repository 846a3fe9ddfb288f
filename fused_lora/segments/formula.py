"""What the tables mean: every adapter's product with all rows, of which each row keeps its own."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats.products import linear, times_weight, whole
from ..hashing import kept, mask_numbers
from ..reference import compute_dtype, room
from .plan import SLICE
from .tables import Tables


class Drops(NamedTuple):
    """What adapters drop of x: seed, a 0-dim int64, and thresholds (R / 16,), hashing.mask_threshold's of each slice
    of the slabs. Each level has a mask of its own, by seed + level. What is kept counts 1 / (1 - p) times by way of the
    scales, which whoever gives thresholds multiplies so."""

    seed: Tensor
    thresholds: Tensor

    def mask(self, rows: Tensor, level: int, M: int, columns: int) -> Tensor:
        """(M, columns): which entries are kept of x on a level, of the tables' rows."""
        return kept(mask_numbers(M, columns, self.seed + level), self.thresholds[rows[level, :M, 1]][:, None])


def ranks_of(A: Tensor, tables: Tables, window: int) -> Tensor:
    """Those of the windows in slabs, which may end within one: what stands for the others is nobody's."""
    ranks = (tables.windows[:, :1] + torch.arange(window, device=tables.windows.device)).flatten()
    return ranks.clamp(max=len(A) - 1)


def _own(tables: Tables, M: int, window: int) -> tuple[Tensor, Tensor]:
    """(M, windows' ranks): which are those of a row's adapters, and the slices of the slabs in which these begin."""
    levels = tables.windows[:, 3].repeat_interleave(window)
    words, places = tables.rows[:, :M].transpose(0, 1).unbind(2)
    words = words[:, levels]
    slices = torch.arange(len(levels), device=words.device) // SLICE - (words & 0xFFFFFF)
    return (slices >= 0) & (slices < words >> 24), places[:, levels]


def _by_level(M: int, columns: int, tables: Tables, window: int, drops: Drops | None) -> list[tuple]:
    """(which of the windows' ranks are a level's, the mask there of x) for each level; where nothing is dropped both
    are None, for all levels at once."""
    if drops is None:
        return [(None, None)]
    levels = tables.windows[:, 3].repeat_interleave(window)
    return [(levels == level, drops.mask(tables.rows, level, M, columns)) for level in range(len(tables.rows))]


def _only(tensor: Tensor, which: Tensor | None) -> Tensor:
    return tensor if which is None else torch.where(which, tensor, 0)


def forward_ref(x, weight, A, B, bias, scales, tables: Tables, window: int, drops: Drops | None = None):
    """(y, xa) with y = x W^T + xa B^T + bias; xa = scale x A^T where the ranks are a row's own, else 0, rounded to x's
    dtype: of the windows' ranks.

        x (M, K)   weight (N, K)   A (R, K), B (N, R) slabs   scales (R / 16,)   ->   y (M, N), xa (M, windows' ranks)

    In float16 xa is scale / room of it, and room enters y and dB. With drops x is masked on its way to xa.
    """
    compute = compute_dtype(x.dtype)
    ranks, (own, places) = ranks_of(A, tables, window), _own(tables, len(x), window)
    xc, low, up = x.to(compute), A[ranks].to(compute), B[:, ranks].to(compute)
    more = room(scales, x.dtype)
    if more is not None:
        scales, up = scales / more, up * more[ranks // SLICE]
    each = _by_level(*x.shape, tables, window, drops)
    products = (_only(_only(xc, mask) @ low.T, of_level) for of_level, mask in each)
    xa = torch.where(own, sum(products) * scales[places], 0).to(x.dtype)
    return linear(x, weight, compute, bias).addmm_(xa.to(compute), up.T).to(x.dtype), xa


def dxa_ref(dy, B, scales, tables: Tables, window: int):
    """scale dy B where the ranks are a row's own, else 0, rounded to dy's dtype: (M, windows' ranks)."""
    compute = compute_dtype(dy.dtype)
    ranks, (own, places) = ranks_of(B.T, tables, window), _own(tables, len(dy), window)
    dxa = (dy.to(compute) @ B[:, ranks].to(compute)) * scales[places]
    return torch.where(own, dxa, 0).to(dy.dtype)


def backward_ref(
    dy, x, weight, A, B, xa, dxa, scales, tables: Tables, window: int, needs: Sequence[bool], drops: Drops | None = None
):
    """(dx, dA, dB), each None where `needs` (three bools) says so; dA and dB of the windows' ranks, dB by columns.

    dx = dy W + mask(dxa A),  dA = dxa^T mask(x),  dB = dy^T xa.
    """
    need_dx, need_dA, need_dB = needs
    compute, ranks = compute_dtype(x.dtype), ranks_of(A, tables, window)
    dyc, low = dy.to(compute), dxa.to(compute)
    each = _by_level(*x.shape, tables, window, drops)
    dx = dA = dB = None
    if need_dx:
        dx, factor = times_weight(dy, weight, compute), A[ranks].to(compute)
        for of_level, mask in each:
            dx += _only(_only(low, of_level) @ factor, mask)
        dx = dx.to(x.dtype)
    # Rows without an adapter may hold what is no number, times which 0 is none.
    has_adapter = (tables.rows[:, : len(x), 0] > 0xFFFFFF).any(0)[:, None]
    if need_dA:
        own = torch.where(has_adapter, x, 0).to(compute)
        dA = sum(_only(low, of_level).T @ _only(own, mask) for of_level, mask in each).to(A.dtype)
    if need_dB:
        more = room(scales, x.dtype)
        dB = xa.to(compute).T @ torch.where(has_adapter, dyc, 0)
        dB = (dB if more is None else dB * more[ranks // SLICE][:, None]).to(B.dtype).T
    return dx, dA, dB


def lora_segments_ref(x, weight, bias, adapters, scales, rows: Tensor, drops: Drops | None = None):
    """y = x W^T + bias, and of each adapter scale x A^T B^T for its rows, by torch's own autograd.

    adapters: (A, B, begins) of each, by whose begins among the windows' ranks `rows`, of the tables, knows its rows.
    """
    flat = x.reshape(-1, x.shape[-1])
    words, places = rows[:, : len(flat)].unbind(2)
    first, has_any = words & 0xFFFFFF, words >> 24 > 0
    masked = None if drops is None else [_only(flat, drops.mask(rows, i, *flat.shape)) for i in range(len(rows))]
    y = flat @ whole(weight, x.dtype).T
    for A, B, begins in adapters:
        own = has_any & torch.stack([first == begin // SLICE for begin in begins]).any(0)  # on each level
        scale = torch.where(own, scales[places], 0)
        each = [(flat, scale.sum(0))] if masked is None else zip(masked, scale, strict=True)
        product = sum(x_in @ A.T * of_rows[:, None] for x_in, of_rows in each)
        y = y + torch.where(own.any(0)[:, None], product.to(x.dtype), 0) @ B.T
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0])
