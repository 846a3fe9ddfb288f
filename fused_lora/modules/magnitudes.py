"""DoRA: each row of W + scale B A is brought to a length of its own, which is learned."""

import torch
from torch import Tensor

from .. import ops, reference


def gain(magnitudes: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """magnitudes / |rows of W + scale B A|, (N,) in float32 (float64 beside float64). Gradients pass to the magnitudes
    alone, as section 4.3 of the paper has it."""
    norms = ops.row_norms(weight, A, B, scale)
    return magnitudes.to(norms.dtype) / norms


def lasting_gain(magnitudes: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> Tensor:
    """The same for a merge: 1 for rows of zeros, which no gain changes, and which could not be divided by theirs."""
    norms = ops.row_norms(weight, A, B, scale)
    return torch.where(norms > reference.SMALLEST_NORM, magnitudes.to(norms.dtype) / norms, 1)


def merge_(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, gains: Tensor) -> None:
    """weight = gains (weight + scale B A), in place, rounded once."""
    wide, update = _in_full(weight, A, B, scale)
    weight.copy_((wide + update) * gains[:, None])


def unmerge_(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor, gains: Tensor) -> None:
    """weight = weight / gains - scale B A, in place, rounded once."""
    wide, update = _in_full(weight, A, B, scale)
    weight.copy_(wide / gains[:, None] - update)


def _in_full(weight: Tensor, A: Tensor, B: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype), reference.times(B.to(dtype) @ A.to(dtype), scale.to(dtype))
