"""Products with a stored weight: some of the result's columns after others, their part of W in scratch meanwhile.

Scratch is small enough to stay in L2 between the kernel that writes it and the one that multiplies from it, and W never
stands whole in memory. One stream runs both in turn, so that one scratch serves all of a pass's chunks.
"""

from collections.abc import Callable
from math import ceil

import torch

from .. import padding
from ..formats import Stored
from .dequantise import dequantise

SCRATCH = 1 << 22  # entries of W at once, 8 MB in 16 bits
STEP = 256  # columns of the result that a chunk is a multiple of: whole tiles, and whole blocks of every format


def chunks(size: int, depth: int) -> list[tuple[int, int]]:
    """The first column and the last of parts of `size` columns that are sums over `depth`, about equally wide."""
    most = max(SCRATCH // depth // STEP, 1) * STEP
    width = ceil(size / ceil(size / most) / STEP) * STEP
    return [(first, min(first + width, size)) for first in range(0, size, width)]


def by_chunks(lhs: torch.Tensor, weight: Stored, rhs_t: bool, multiply: Callable) -> torch.Tensor:
    """(M, columns) in lhs's dtype, which multiply(part of W, slice of columns, out, first_col) computes: rows of W make
    columns with rhs_t, columns of W without. first_col is None where out is all of the result."""
    size, depth = weight.shape if rhs_t else reversed(weight.shape)
    result = torch.empty(lhs.shape[0], size, dtype=lhs.dtype, device=lhs.device)
    parts = chunks(size, depth)
    width = parts[0][1]
    scratch = padding.empty(*((width, depth) if rhs_t else (depth, width)), result)
    for first, last in parts:
        part = scratch[: last - first] if rhs_t else scratch[:, : last - first]
        dequantise(weight, part, *((first, 0) if rhs_t else (0, first)))
        multiply(part, slice(first, last), result[:, first:last], None if len(parts) == 1 else first)
    return result


def cut(vector: torch.Tensor | None, columns: slice) -> torch.Tensor | None:
    return None if vector is None else vector[columns]
