"""The LoRA linear by torch's own products, which are cuBLAS's on a GPU: the best without kernels of one's own.

    y = x W^T + bias, then y += xa B^T in place        dx = dy W, then dx += dxa A in place

No temporary is as large as y or dx. Every result is rounded to its dtype where a product ends, y and dx twice, so
errors are a little above the other backends'. Dropout's mask is the package's own, made of some rows at a time: the
same entries as everywhere, but slow.
LoRA: Hu et al. 2021, arXiv:2106.09685.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .formats import Stored
from .formats.products import linear, times_weight

MASKED_AT_ONCE = 1 << 22  # entries, of which there are several copies in int64


def lora_linear_forward(x, weight, A, B, bias, scale, seed, p, gain=None):
    """(y, xa) of reference.lora_linear_forward_ref, for x (M, K)."""
    A, up, more = A.to(x.dtype), B.to(x.dtype), reference.room(scale, x.dtype)
    if more is not None:
        scale, up = scale / more, up * more
    xa = _shrink(x, A, seed, p).mul_(scale.reshape(1))  # of one dimension: see reference.times
    y = _linear(x, weight, None if bias is None or gain is not None else bias.to(x.dtype))
    y.addmm_(xa, up.to(x.dtype).T)
    return y if gain is None else reference.with_gain(y, gain, bias).to(x.dtype), xa


def lora_linear_backward(dy, x, weight, A, B, xa, scale, seed, p, needs, dxa=None):
    """(dx, dA, dB, dxa) of reference.lora_linear_backward_ref."""
    need_dx, need_dA, need_dB = needs
    if dxa is None:
        dxa = (dy @ B.to(dy.dtype)).mul_(scale.reshape(1))
    dx = dA = dB = None
    if need_dx:
        dx = _expand_(_times_weight(dy, weight), dxa, A.to(dy.dtype), seed, p)
    if need_dA:
        dA = _sum_over_rows(dxa, x, seed, p, A.dtype)
    if need_dB:
        dB = _product(dy.T, xa, B.dtype)
        more = reference.room(scale, x.dtype)
        dB = dB if more is None else dB.mul_(more)
    return dx, dA, dB, dxa


def _linear(x: Tensor, weight: Tensor | Stored, bias: Tensor | None) -> Tensor:
    if not isinstance(weight, Stored):
        return F.linear(x, weight, bias)
    return linear(x, weight, reference.compute_dtype(x.dtype), bias).to(x.dtype)


def _times_weight(dy: Tensor, weight: Tensor | Stored) -> Tensor:
    if not isinstance(weight, Stored):
        return dy @ weight
    return times_weight(dy, weight, reference.compute_dtype(dy.dtype)).to(dy.dtype)


def _shrink(x: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dropout(x) A^T."""
    if seed is None:
        return x @ A.T
    xa = x.new_empty(x.shape[0], A.shape[0])
    for rows in _parts(x):
        torch.mm(reference.dropout(x[rows], p, seed, rows.start), A.T, out=xa[rows])
    return xa


def _expand_(dx: Tensor, dxa: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """dx += dropout(dxa A)."""
    if seed is None:
        return dx.addmm_(dxa, A)
    for rows in _parts(dx):
        dx[rows] += reference.dropout(dxa[rows] @ A, p, seed, rows.start)
    return dx


def _sum_over_rows(dxa: Tensor, x: Tensor, seed: Tensor | None, p: float, dtype: torch.dtype) -> Tensor:
    """dxa^T dropout(x)."""
    if seed is None:
        return _product(dxa.T, x, dtype)
    total = x.new_zeros(dxa.shape[1], x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    for rows in _parts(x):
        total += _product(dxa[rows].T, reference.dropout(x[rows], p, seed, rows.start), total.dtype)
    return total.to(dtype)


def _product(lhs: Tensor, rhs: Tensor, dtype: torch.dtype) -> Tensor:
    """lhs rhs in a dtype, rounded to it once."""
    if lhs.dtype == dtype or lhs.dtype.itemsize > 2 or not lhs.is_cuda:
        return (lhs @ rhs).to(dtype)
    return torch.mm(lhs, rhs, out_dtype=torch.float32).to(dtype)


def _parts(matrix: Tensor) -> Iterator[slice]:
    """Rows that are masked at once."""
    step = max(1, MASKED_AT_ONCE // max(1, matrix.shape[1]))
    return (slice(first, first + step) for first in range(0, matrix.shape[0], step))
