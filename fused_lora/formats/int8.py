"""INT8 by rows, in bitsandbytes' layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .stored import Stored, check_weight

LARGEST = 127


@dataclass(frozen=True)
class INT8:
    """W = codes * scale / 127, codes (N, K) in int8, scale (N,) the largest entry of each row: bitsandbytes' SCB.

    LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339.
    """

    name = "int8"

    def quantise(self, weight: Tensor) -> Stored:
        check_weight(weight)
        weight = weight.detach().float()
        scale = self.largest(weight.abs())
        return Stored(self.encode(self.in_codes(weight, scale[:, None])), scale, None, *weight.shape)

    def dequantise(self, stored: Stored, first: int, last: int) -> Tensor:
        # By a tensor: a CUDA device multiplies by the reciprocal of a number, whose last bit may be another.
        scales = self.scales_of(stored, first, last) / stored.scale.new_full((), LARGEST)
        return self.codes_of(stored, first, last).float() * scales

    def rows_of_blocks(self, K: int) -> int:
        return 1

    def largest(self, sizes: Tensor) -> Tensor:
        return sizes.amax(1)

    def rescaled(self, stored: Stored, largest: Tensor, touched: Tensor, cover: bool) -> Stored:
        return stored._replace(scale=torch.where(touched, largest, stored.scale))

    def spread(self, by_block: Tensor, first: int, last: int, K: int) -> Tensor:
        return by_block[first:last, None]

    def scales_of(self, stored: Stored, first: int, last: int) -> Tensor:
        return self.spread(stored.scale, first, last, stored.K)

    def in_codes(self, weight: Tensor, scales: Tensor) -> Tensor:
        return weight * torch.where(scales == 0, 0, LARGEST / scales)

    def values(self, device: torch.device) -> Tensor:
        return torch.arange(-LARGEST, LARGEST + 1, dtype=torch.float32, device=device)

    def encode(self, numbers: Tensor) -> Tensor:
        return numbers.round().clamp(-LARGEST, LARGEST).to(torch.int8)

    def codes_of(self, stored: Stored, first: int, last: int) -> Tensor:
        return stored.codes[first:last]
