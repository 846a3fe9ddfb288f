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
        scale = weight.abs().amax(1)
        per_code = torch.where(scale == 0, 0, LARGEST / scale)
        codes = (weight * per_code[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
        return Stored(codes, scale, None, *weight.shape)

    def dequantise(self, stored: Stored, first: int, last: int) -> Tensor:
        # By a tensor: a CUDA device multiplies by the reciprocal of a number, whose last bit may be another.
        scale = stored.scale[first:last] / stored.scale.new_full((), LARGEST)
        return stored.codes[first:last].float() * scale[:, None]
