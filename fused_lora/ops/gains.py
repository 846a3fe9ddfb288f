"""The backward pass of gains: y = gain sums + bias, by columns.

Either gain W and gain B stand for W and B, and csrc makes dgain beside dB, in one reading of dy and y; or gain dy
stands for dy, made with dgain in a pass before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, reference
from .alone import in_triton, kernel_bias, rows_of
from .library import launching
from .parts import Part


def are_in(parts: Sequence[Part]) -> bool:
    return any(part.gain is not None for part in parts)


def known_backward(device: torch.device) -> bool:
    """Whether csrc's kernels for a card know gains backward."""
    return backends.gpu(device).capability == 90


def weights_are_less(rows: int, parts: Sequence[Part], summed: Sequence[Part]) -> bool:
    """Whether gain W of the summed parts takes fewer bytes than gain dy of all: W is read and written, or dy and y read
    and gain dy written, where in csrc y alone is read beside what is read anyway."""
    weights = sum(part.weight.numel() for part in summed if part.gain is not None)
    return 4 * weights < 5 * rows * sum(len(part.weight) for part in parts if part.gain is not None)


def scaled(part: Part, need_weight: bool) -> Part:
    """With gain W, where it is needed, and gain B for W and B."""
    if part.gain is None:
        return part
    if in_triton(part.weight):
        from ..kernels.scaled_rows import scaled_rows

        with launching("scaled_rows", part.weight):
            weight, B = scaled_rows(part.weight, part.B, part.gain, need_weight)
    else:
        weight, B = (times(matrix, part.gain[:, None]) for matrix in (part.weight, part.B))
    return part._replace(weight=part.weight if weight is None else weight, B=B)


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
