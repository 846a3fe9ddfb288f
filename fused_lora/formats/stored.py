"""A weight in a format."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A weight W of `shape` (N, K) as codes, and scales in float32, of which its format knows how they make W."""

    format: "Format"
    codes: Tensor
    scales: tuple[Tensor, ...]
    shape: tuple[int, int]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W, computed in float32 and rounded once."""
        return self.format.dequantise(self).to(dtype)


class Format(Protocol):
    """One way to keep weights."""

    def quantise(self, weight: Tensor) -> Stored:
        """The nearest codes of a weight (N, K), by scales of its largest entries. ValueError for what is not finite."""

    def dequantise(self, stored: Stored) -> Tensor:
        """(N, K) in float32."""


def check_weight(weight: Tensor) -> None:
    """Whether it can be quantised."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a matrix of floats, got {tuple(weight.shape)} of {weight.dtype}")
    if weight.numel() == 0:
        raise ValueError(f"weight must have entries, got {tuple(weight.shape)}")
    if not weight.isfinite().all():
        raise ValueError("weight must be finite: a scale is of its largest entry")
