"""The dropout mask: a counter-based hash of (seed, row, column), computed wherever it is needed, never stored."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .random import hash_bits


@dataclass(frozen=True)
class Dropout:
    """p in [0, 1] and a 0-dim int64 seed on the device; without a seed nothing is dropped."""

    p: float = 0.0
    seed: torch.Tensor | None = None

    @property
    def active(self) -> bool:
        return self.seed is not None

    @property
    def threshold(self) -> int:
        """An entry is kept where its hash, as int32, is at or above this."""
        return min(round(self.p * 2**32), 2**32 - 1) - 2**31 if self.active else 0

    @property
    def keep_scale(self) -> float:
        """1 / (1 - p); 0 where everything is dropped."""
        if not self.active:
            return 1.0
        return 0.0 if self.p == 1 else 1 / (1 - self.p)


@triton.jit
def keep_mask(seed, row, col, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Which entries of the tile at (row, col) are kept; reference.keep_mask is the same function in torch."""
    h = hash_bits(seed, row, col, BLOCK_ROWS, BLOCK_COLS)
    return (h ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold
