"""Which formats there are, and a stored weight's own."""

import torch
from torch import Tensor

from .fp8 import CODES, FP8
from .int8 import INT8
from .nf4 import NF4
from .stored import Format, Stored

NAMED = {"fp8": FP8(), "int8": INT8(), "nf4": NF4(), "nf4-nested": NF4(nested=True)}


def format_of(stored: Stored) -> Format:
    """What makes W of it. Scales of powers of two are not told from others."""
    if stored.codes.dtype is CODES:
        if stored.scale.dim() == 0:
            return FP8("tensor")
        return FP8("rows") if stored.scale.shape == (stored.N, 1) else FP8("blocks")
    return INT8() if stored.codes.dtype is torch.int8 else NF4(nested=stored.outer is not None)


def dequantise(stored: Stored, dtype: torch.dtype = torch.float32, first: int = 0, last: int | None = None) -> Tensor:
    """W, or its rows from first to last, computed in float32 and rounded once."""
    return format_of(stored).dequantise(stored, first, stored.N if last is None else last).to(dtype)
