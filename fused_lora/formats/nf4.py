"""NF4 in bitsandbytes' layout: two codes a byte, over the flat order of a weight, a scale for each 64 of them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .stored import Stored, check_weight

BLOCK, NESTED_BLOCK = 64, 256
COUNT = 256  # of the values of nested scales
# Quantiles of the normal distribution, with a zero, scaled to -1 to 1.
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4:
    """W[i] = VALUES[codes[i]] * scale[i // 64] for each i of W's flat order.

        codes    uint8 (ceil(N K / 2), 1), the first of a pair in the upper half
        scales   absmax (ceil(N K / 64),) in float32; blocks run on from row to row where K is no multiple of 64

    nested: scale has absmax in 8 bits instead, and outer (257 + ceil(blocks / 256),) in float32 what makes it of them:
    an offset, 256 values, and a factor for each 256 blocks, absmax[i] = values[scale[i]] * factors[i // 256] + offset.
    QLoRA: Dettmers et al. 2023, arXiv:2305.14314.
    """

    nested: bool = False

    @property
    def name(self) -> str:
        return "nf4 with nested scales" if self.nested else "nf4"

    def quantise(self, weight: Tensor) -> Stored:
        check_weight(weight)
        flat = weight.detach().float().flatten()
        blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        absmax = blocks.abs().amax(1)
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1)
        codes = torch.bucketize(scaled, _between(_values(flat))).to(torch.uint8).flatten()[: flat.numel()]
        codes = F.pad(codes, (0, flat.numel() % 2), value=_ZERO)
        packed = (codes[::2] << 4 | codes[1::2])[:, None]
        scale, outer = nest(absmax) if self.nested else (absmax, None)
        return Stored(packed, scale, outer, *weight.shape)

    def dequantise(self, stored: Stored, first: int, last: int) -> Tensor:
        start, end = first * stored.K, last * stored.K
        pairs = stored.codes.flatten()[start // 2 : (end + 1) // 2]
        codes = torch.stack([pairs >> 4, pairs & 15], -1).flatten()[start % 2 :][: end - start]
        absmax = self._absmax(stored, start // BLOCK, (end + BLOCK - 1) // BLOCK)
        absmax = absmax.repeat_interleave(BLOCK)[start % BLOCK :][: end - start]
        return (_values(absmax)[codes.int()] * absmax).view(last - first, stored.K)

    def _absmax(self, stored: Stored, first: int, last: int) -> Tensor:
        """Of blocks from first to last."""
        if not self.nested:
            return stored.scale[first:last]
        offset, values, factors = unpack(stored.outer)
        factor = factors[torch.arange(first, last, device=stored.device) // NESTED_BLOCK]
        return values[stored.scale[first:last].int()] * factor + offset


_ZERO = VALUES.index(0.0)


def _values(like: Tensor) -> Tensor:
    return torch.tensor(VALUES, device=like.device)


def _between(values: Tensor) -> Tensor:
    """The middles of neighbours."""
    return (values[:-1] + values[1:]) / 2


def dynamic_values() -> Tensor:
    """(256,) in order: of each decade down to 1e-6 the middles of equal parts of 0.1 to 1, twice as many in each next
    one, with both signs; and 0 and 1. 8-bit optimizers: Dettmers et al. 2021, arXiv:2110.02861."""
    found = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (10.0 ** (decade - 6) * _between(bounds)).tolist()
        found += [*middles, *(-middle for middle in middles)]
    return torch.tensor(sorted(found))


def nest(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """absmax as scale and outer."""
    offset, values = absmax.mean(), dynamic_values().to(absmax.device)
    centred = absmax - offset
    blocks = F.pad(centred, (0, -centred.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    factors = blocks.abs().amax(1)
    scaled = blocks / torch.where(factors == 0, 1, factors)[:, None]
    codes = torch.bucketize(scaled, _between(values)).to(torch.uint8).flatten()[: centred.numel()]
    return codes, torch.cat([offset[None], values, factors])


def unpack(outer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An outer's offset, values and factors."""
    return outer[0], outer[1 : 1 + COUNT], outer[1 + COUNT :]
