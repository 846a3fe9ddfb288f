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
        """An entry is kept where its number of 16 bits is at or above this."""
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
def _choose(pair, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    first = tl.where(pair == 0, tl.full([], a, tl.uint32), tl.full([], b, tl.uint32))
    return tl.where(pair < 2, first, tl.where(pair == 2, tl.full([], c, tl.uint32), tl.full([], d, tl.uint32)))


@triton.jit
def keep_mask(seed, row, col, threshold, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Which entries of the tile at (row, col) are kept; reference.keep_mask is the same function in torch."""
    first = mix(seed.to(tl.uint32) + 0x9E3779B9)
    second = mix((first ^ (seed >> 32).to(tl.uint32)) + 0x9E3779B9)
    rows = (row + tl.arange(0, BLOCK_ROWS)).to(tl.uint32)
    key_in = mix(mix(rows ^ first) + second)
    key_mid = mix(key_in + 0x9E3779B9)
    cols = (col + tl.arange(0, BLOCK_COLS)).to(tl.uint32)
    pair = cols // 2 % 4
    flip = _choose(pair, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    factor = _choose(pair, 0xA0761D65, 0xE7037ED1, 0x8EBC6AF1, 0x589965CD)
    group = _fold(key_in[:, None] ^ (cols // 8 * 0x9E3779B9)[None, :], 0x7FEB352D) ^ key_mid[:, None]
    word = _fold(group ^ flip[None, :], factor[None, :])
    return ((word >> (cols % 2 * 16)[None, :]) & 0xFFFF).to(tl.int32) >= threshold
