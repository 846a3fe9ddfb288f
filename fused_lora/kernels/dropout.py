"""The dropout mask: a counter-based hash of (seed, row, column), computed wherever it is needed, never stored."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..reference import mask_threshold
from .random import mix


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
        """Which numbers are dropped, and whether they are kept instead; as reference.mask_threshold has it."""
        return mask_threshold(self.p) if self.active else 0

    @property
    def keep_scale(self) -> float:
        """1 / (1 - p); 0 where everything is dropped."""
        if not self.active:
            return 1.0
        return 0.0 if self.p == 1 else 1 / (1 - self.p)


@triton.jit
def _fold(a, b):
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32) ^ product.to(tl.uint32)


@triton.jit
def keep_mask(seed, row, col, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Which entries of the tile at (row, col) are kept; reference.keep_mask is the same function in torch."""
    first = mix(seed.to(tl.uint32) + 0x9E3779B9)
    second = mix((first ^ (seed >> 32).to(tl.uint32)) + 0x9E3779B9)
    rows = (row + tl.arange(0, BLOCK_ROWS)).to(tl.uint32)
    cols = (col + tl.arange(0, BLOCK_COLS)).to(tl.uint32)
    factor = (cols // 2 % 16 * 0x9E3779B9) ^ 0xC2B2AE35 | 1
    group = _fold(mix(mix(rows ^ first) + second)[:, None] ^ (cols // 32 * 0x9E3779B9)[None, :], 0x7FEB352D)
    word = _fold(group, factor[None, :])
    number = ((word >> (cols % 2 * 16)[None, :]) & 0x7FFF).to(tl.int32)
    picked = (number >= (threshold & 0xFFFF)) & (number <= 0x7C00)
    return picked == (threshold > 0xFFFF)
