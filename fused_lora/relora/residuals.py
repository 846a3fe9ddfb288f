"""What merges keep beside weights that do not hold it: the low halves of 16-bit ones, and of those in a format what
rounding to codes leaves."""

import torch
from torch import Tensor

from ..formats import Stored


def lows_beside(weights: dict[str, Tensor | Stored], precision: str) -> dict[str, Tensor]:
    """Those that weights need, without memory."""
    dtypes = {name: _dtype_beside(weight) for name, weight in weights.items()}
    if precision not in ("auto", "residual"):
        return {}
    return {
        name: torch.empty(weights[name].shape, dtype=dtype, device="meta") for name, dtype in dtypes.items() if dtype
    }


def _dtype_beside(weight: Tensor | Stored) -> torch.dtype | None:
    if isinstance(weight, Stored):
        return torch.bfloat16
    return torch.int16 if weight.dtype.itemsize == 2 else None


def new_lows(weights: dict[str, Tensor | Stored], precision: str, residual_device: str) -> dict[str, Tensor]:
    """Zeros, beside the weights or in the host's memory."""
    return {name: _new(low, weights[name], residual_device) for name, low in lows_beside(weights, precision).items()}


def _new(low: Tensor, weight: Tensor | Stored, residual_device: str) -> Tensor:
    place = {"device": weight.device}
    if residual_device == "cpu":
        place = {"device": "cpu", "pin_memory": weight.is_cuda}
    return torch.zeros(low.shape, dtype=low.dtype, **place)
