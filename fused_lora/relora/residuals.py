"""The low halves beside 16-bit weights, in which a merge keeps what 16 bits do not hold."""

import torch
from torch import Tensor


def needs_low(weight: Tensor, precision: str) -> bool:
    return precision in ("auto", "residual") and weight.dtype.itemsize == 2


def new_low(weight: Tensor, residual_device: str) -> Tensor:
    """Zeros, beside the weight or in the host's memory."""
    place = {"device": weight.device}
    if residual_device == "cpu":
        place = {"device": "cpu", "pin_memory": weight.is_cuda}
    return torch.zeros(weight.shape, dtype=torch.int16, **place)
