"""Parts whose rows have adapters of their own: A and B are slabs of all adapters of a linear, and tables say which of
their ranks a row has.

    weight (N, K)   A (R, K)   B (N, R)   scale (R / 16,), of each slice of 16 ranks

xa and dxa, dA and dB are of the ranks of the pass's windows (segments/plan.py), one window after another, dB by
columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .. import segments
from .alone import like, no_autocast, rows_of
from .parts import Part


class Segments(NamedTuple):
    """Of one part's rows."""

    tables: segments.Tables
    window: int

    @property
    def ranks(self) -> int:
        return self.window * self.tables.windows.shape[0]


def flatten(each: Sequence[segments.Tables]) -> list[Tensor]:
    return [table for tables in each for table in tables]


def unflatten(tensors: Sequence[Tensor] | None, window: int, parts: int) -> list[Segments | None]:
    """Of each part; None for parts whose rows all have the same factors."""
    if tensors is None:
        return [None] * parts
    size = len(segments.Tables._fields)
    return [Segments(segments.Tables(*tensors[i * size : (i + 1) * size]), window) for i in range(parts)]


def empty_grads(part: Part, of: Segments, need_dA: bool, need_dB: bool) -> tuple[Tensor, Tensor]:
    """dA and dB, or what stands for one that is not needed."""
    N, K = part.weight.shape
    dA = part.A.new_empty((of.ranks, K) if need_dA else 0)
    return dA, part.B.new_empty(of.ranks, N).t() if need_dB else part.B.new_empty(0)


def forward(x: Tensor, part: Part, of: Segments) -> tuple[Tensor, Tensor]:
    """(y, xa)."""
    weight, A, B, bias, scales, *_ = part
    with no_autocast(x):
        y, xa = segments.forward_ref(rows_of(x), weight, A, B, bias, scales, *of)
    return like(y, x), xa


def backward(dy: Tensor, x: Tensor, part: Part, xa: Tensor, dxa: Tensor | None, needs: Sequence[bool], of: Segments):
    """(dx, dA, dB, dxa), of the first three None where `needs` says so."""
    weight, A, B, _, scales, *_ = part
    rows = rows_of(dy)
    with no_autocast(x):
        dxa = segments.dxa_ref(rows, B, scales, *of) if dxa is None else dxa
        dx, dA, dB = segments.backward_ref(rows, rows_of(x), weight, A, B, xa, dxa, scales, *of, needs)
    return None if dx is None else like(dx, x), dA, dB, dxa
