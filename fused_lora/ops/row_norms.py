"""The norms of the rows of W + scale B A, which DoRA divides by."""

import torch
from torch import Tensor

from .. import backends, checks, reference
from ..formats import Stored, dequantise
from .alone import in_triton
from .library import define, launching, ops


def _row_norms(weight, A, B, scale):
    if not in_triton(weight) or A.numel() == 0:
        return reference.row_norms_ref(weight, A, B, scale)
    from ..kernels.row_norms import row_norms as kernel

    with launching("row_norms", weight):
        return kernel(weight, A.to(weight.dtype), B.to(weight.dtype), scale, backends.gpu(weight.device))


define(
    "lora_row_norms(Tensor weight, Tensor A, Tensor B, Tensor scale) -> Tensor",
    _row_norms,
    lambda weight, A, B, scale: weight.new_empty(weight.shape[0], dtype=checks.scale_dtype(weight)),
)


def row_norms(weight: Tensor | Stored, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """|W + scale B A| of each row, (N,) in float32 (float64 beside float64), 2^-126 where it is less: one can divide by
    them. W is read once, and no sum is stored.

        weight (N, K)   A (r, K), B (N, r) in any floating dtype, read in weight's   scale as Part's, a tensor

    It has no gradients, as DoRA's norm has none (section 4.3 of its paper).
    DoRA: Liu et al. 2024, arXiv:2402.09353.
    """
    if isinstance(weight, Stored):
        rows = ((dequantise(weight, A.dtype, *chunk), B[slice(*chunk)]) for chunk in weight.chunks())
        return torch.cat([row_norms(of, A, up, scale) for of, up in rows])
    return ops.lora_row_norms(weight.detach(), A.detach(), B.detach(), scale)
