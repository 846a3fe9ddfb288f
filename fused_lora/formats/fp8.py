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
        scale = self._largest(weight.abs()) / LARGEST
        if self.powers:
            mantissa, exponent = torch.frexp(scale)  # scale = mantissa 2^exponent, mantissa from 0.5 to 1
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
            scale = torch.where(mantissa == 0, 0, scale)
        scale = torch.where(scale == 0, 1, scale)
        # Rounding to e4m3 does not saturate: what the division rounds above the largest number would be none.
        codes = (weight / self._spread(scale, weight.shape)).clamp(-LARGEST, LARGEST).to(CODES)
        return Stored(codes, scale, None, *weight.shape)

    def dequantise(self, stored: Stored, first: int, last: int) -> Tensor:
        codes, scale = stored.codes[first:last].float(), stored.scale
        if self.by == "rows":
            return codes * scale[first:last]
        if self.by == "tensor":
            return codes * scale
        blocks = scale[first // BLOCK : (last + BLOCK - 1) // BLOCK]
        before = first % BLOCK
        return codes * self._spread(blocks, (before + len(codes), stored.K))[before:]

    def _largest(self, sizes: Tensor) -> Tensor:
        if self.by == "tensor":
            return sizes.amax()
        if self.by == "rows":
            return sizes.amax(1, keepdim=True)
        N, K = sizes.shape
        padded = F.pad(sizes, (0, -K % BLOCK, 0, -N % BLOCK))
        return padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).amax((1, 3))

    def _spread(self, scale: Tensor, shape: tuple[int, int]) -> Tensor:
        """As a matrix of the weight's shape, or what is broadcast to one."""
        if self.by != "blocks":
            return scale
        N, K = shape
        return scale.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
