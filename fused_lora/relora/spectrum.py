"""The rank of what training did to a weight: LoRA's change has r singular values, ReLoRA's r for each cycle."""

import torch
from torch import Tensor


def change_spectrum(before: Tensor, after: Tensor) -> Tensor:
    """The singular values of after - before, two (N, K) matrices, in float32, largest first.

    Figure 5 of Lialin et al. 2023, arXiv:2307.05695.
    """
    return torch.linalg.svdvals(after.float() - before.float())


def numerical_rank(values: Tensor, longer_side: int) -> int:
    """How many singular values stand above float32's rounding of the largest, as torch.linalg.matrix_rank counts."""
    return int((values > values[0] * longer_side * torch.finfo(torch.float32).eps).sum())
