"""The backward pass of gains: y = gain sums + bias, by columns.

Either gain W and gain B stand for W and B, and csrc makes dgain beside dB, in one reading of dy and y; or gain dy
stands for dy, made with dgain in a pass before.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, reference
from ..formats import Stored
from .alone import in_triton, kernel_bias, rows_of
from .library import launching
from .parts import Part


def are_in(parts: Sequence[Part]) -> bool:
    return any(part.gain is not None for part in parts)


def are_for_csrc(x: Tensor, parts: Sequence[Part], summed: Sequence[Part]) -> bool:
    """Whether its kernels for x's card know gains backward, and gain W of the summed parts is cheaper than gain dy of
    all. In bytes: W is read and written, 4 an entry; or dy and y are read and gain dy written, 6 an entry, against y
    in csrc, half of whose reading is hidden (docs/dora.md): 1."""
    if backends.gpu(x.device).capability != 90 or any(isinstance(part.weight, Stored) for part in parts):
        return False
    weights = sum(part.weight.numel() for part in summed if part.gain is not None)
    columns = sum(part.weight.shape[0] for part in parts if part.gain is not None)
    return 4 * weights < (6 - 1) * math.prod(x.shape[:-1]) * columns


def backward(dy: Tensor, y: Tensor, part: Part, need_dbias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gain dy, dgain, dbias)."""
    if in_triton(dy):
        from ..kernels.gain_backward import gain_backward

        with launching("gain_backward", dy):
            gpu = backends.gpu(dy.device)
            dsums, dgain, dbias = gain_backward(
                rows_of(dy), rows_of(y), kernel_bias(part.bias), part.gain, gpu, need_dbias
            )
    else:
        dsums, dgain, dbias = reference.gain_backward_ref(rows_of(dy), rows_of(y), part.bias, part.gain)
    return dsums.view(dy.shape), dgain, dbias.to(part.bias.dtype) if need_dbias else None


def times(matrix: Tensor, gain: Tensor) -> Tensor:
    """Rounded once."""
    return (matrix.to(torch.promote_types(matrix.dtype, gain.dtype)) * gain).to(matrix.dtype)
