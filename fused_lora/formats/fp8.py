"""FP8: e4m3 codes, a scale for each row, for each block of 128 x 128, or for all."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .stored import Stored, check_weight

CODES, LARGEST = torch.float8_e4m3fn, 448.0
BLOCK = 128
SCALES = ("rows", "blocks", "tensor")


@dataclass(frozen=True)
class FP8:
    """W = codes * scale, codes (N, K) in float8_e4m3fn.

        by       "rows": scale (N, 1)   "blocks": (ceil(N / 128), ceil(K / 128)), as Hugging Face's weight_scale_inv
                 "tensor": ()
        powers   scales are powers of two: what was dequantised is quantised again to the same values

    Raises ValueError naming the argument.
    """

    by: str = "rows"
    powers: bool = False

    @property
    def name(self) -> str:
        return f"fp8 by {self.by}"

    def __post_init__(self):
        if self.by not in SCALES:
            raise ValueError(f"by must be one of {', '.join(SCALES)}, got {self.by!r}")

    def quantise(self, weight: Tensor) -> Stored:
        """The scale of what is zero is 1."""
        check_weight(weight)
        weight = weight.detach().float()
        scale = self._scale(self.largest(weight.abs()))
        codes = self.encode(self.in_codes(weight, self.spread(scale, 0, *weight.shape)))
        return Stored(codes, scale, None, *weight.shape)

    def dequantise(self, stored: Stored, first: int, last: int) -> Tensor:
        return self.codes_of(stored, first, last).float() * self.scales_of(stored, first, last)

    def rows_of_blocks(self, K: int) -> int:
        return BLOCK if self.by == "blocks" else 1

    def largest(self, sizes: Tensor) -> Tensor:
        if self.by == "tensor":
            return sizes.amax()
        if self.by == "rows":
            return sizes.amax(1, keepdim=True)
        N, K = sizes.shape
        padded = F.pad(sizes, (0, -K % BLOCK, 0, -N % BLOCK))
        return padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).amax((1, 3))

    def rescaled(self, stored: Stored, largest: Tensor, touched: Tensor, cover: bool) -> Stored:
        return stored._replace(scale=torch.where(touched, self._scale(largest), stored.scale))

    def _scale(self, largest: Tensor) -> Tensor:
        scale = largest / LARGEST
        if self.powers:
            mantissa, exponent = torch.frexp(scale)  # scale = mantissa 2^exponent, mantissa from 0.5 to 1
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
            scale = torch.where(mantissa == 0, 0, scale)
        return torch.where(scale == 0, 1, scale)

    def spread(self, by_block: Tensor, first: int, last: int, K: int) -> Tensor:
        if self.by != "blocks":
            return by_block[first:last] if self.by == "rows" else by_block
        blocks = by_block[first // BLOCK : (last + BLOCK - 1) // BLOCK]
        before = first % BLOCK
        rows = blocks.repeat_interleave(BLOCK, 0)[before : before + last - first]
        return rows.repeat_interleave(BLOCK, 1)[:, :K]

    def scales_of(self, stored: Stored, first: int, last: int) -> Tensor:
        return self.spread(stored.scale, first, last, stored.K)

    def in_codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        return weight / scales

    def values(self, device: torch.device) -> Tensor:
        found = torch.arange(256, dtype=torch.uint8, device=device).view(CODES).float()
        return found[found.isfinite()].unique()

    def encode(self, numbers: Tensor) -> Tensor:
        # Rounding to e4m3 does not saturate: what the division rounds above the largest number would be none.
        return numbers.clamp(-LARGEST, LARGEST).to(CODES)

    def codes_of(self, stored: Stored, first: int, last: int) -> Tensor:
        return stored.codes[first:last]
