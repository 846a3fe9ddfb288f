"""Products with a frozen weight, in plain torch. One in a format is read some rows at a time: W never stands whole in
memory. Its rows are rounded to the activations' dtype, as kernels read them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .known import dequantise
from .stored import Stored


def linear(x: Tensor, weight: Tensor | Stored, compute: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, summed and returned in `compute`."""
    xc, bias = x.to(compute), None if bias is None else bias.to(compute)
    if not isinstance(weight, Stored):
        return F.linear(xc, weight.to(compute), bias)
    chunks = (dequantise(weight, x.dtype, *rows).to(compute) for rows in weight.chunks())
    y = torch.cat([F.linear(xc, chunk) for chunk in chunks], -1)
    return y if bias is None else y.add_(bias)


def times_weight(dy: Tensor, weight: Tensor | Stored, compute: torch.dtype) -> Tensor:
    """dy W, summed and returned in `compute`."""
    dyc = dy.to(compute)
    if not isinstance(weight, Stored):
        return dyc @ weight.to(compute)
    dx = dyc.new_zeros(*dy.shape[:-1], weight.K)
    for first, last in weight.chunks():
        dx += dyc[..., first:last] @ dequantise(weight, dy.dtype, first, last).to(compute)
    return dx


def whole(weight: Tensor | Stored, dtype: torch.dtype) -> Tensor:
    """W itself, where all of it is wanted after all."""
    return dequantise(weight, dtype) if isinstance(weight, Stored) else weight
