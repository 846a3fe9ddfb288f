"""ReLoRA's restart of many layers as one op: their updates merged in place, their factors begun anew."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import checks, reference
from .library import define

ops = torch.ops.fused_lora


def _merge_and_reinit(weights, As, Bs, scales, seeds, lows, stochastic):
    low_of = iter(lows)
    for i, (weight, A, B, scale, seed) in enumerate(zip(weights, As, Bs, scales, seeds, strict=True)):
        low = next(low_of) if lows else None
        try:
            reference.merge_and_reinit_ref_(
                weight, A, B, scale, torch.tensor(seed, device=weight.device), low, stochastic
            )
        except Exception as error:
            done = f"layers 0 to {i - 1} have restarted" if i else "no layer has restarted"
            raise RuntimeError(f"{done} of {len(weights)}, the others are as they were: {error}") from error


define(
    "merge_and_reinit_(Tensor(a!)[] weights, Tensor(b!)[] As, Tensor(c!)[] Bs, Tensor[] scales, int[] seeds,"
    " Tensor(d!)[] lows, bool stochastic) -> ()",
    _merge_and_reinit,
    lambda weights, As, Bs, scales, seeds, lows, stochastic: None,
)


def merge_and_reinit_(
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scales: Sequence[float | Tensor],
    seeds: Sequence[int],
    lows: Sequence[Tensor] | None = None,
    rounding: str = "nearest",
) -> None:
    """For each layer, in place: weight += scale * B A, then A ~ U(-1, 1) / sqrt(K) from its seed, and B = 0.

        weight (N, K) bf16 | fp16 | fp32 | fp64   A (r, K), B (N, r) in any floating dtypes   low (N, K) int16

    The product and the sum are computed in float32 and rounded once, and entries to which nothing is added keep their
    bits. What of an update survives that rounding depends on how small it is beside the weight:

    * rounding="nearest": in 16 bits, whatever is below half a unit in the last place is lost.
    * rounding="stochastic": up or down, each as likely as it is near. Unbiased, and noisier than the nearest.
    * lows: the sum goes on in two halves, weight and an int16 beside it (zeros to begin with), and nothing is lost.
      reference.split says how. For all layers or for none; of 16-bit weights.

    A and the rounding come from a counter-based generator: the same seed gives the same numbers on every rank and
    device. Keeps every data_ptr and moves the version counters. If it fails half-way, the error says which layers have
    restarted; none is half restarted.
    Raises ValueError or TypeError naming the layer and the argument before anything is changed.
    ReLoRA: Lialin et al. 2023, arXiv:2307.05695.
    """
    checks.check_restart(weights, As, Bs, scales, seeds, lows or [None] * len(weights), rounding)
    if not weights:
        return
    with torch.no_grad():
        scales = [
            scale if isinstance(scale, Tensor) else torch.full((), scale, dtype=torch.float32, device=weight.device)
            for scale, weight in zip(scales, weights, strict=True)
        ]
        weights, As, Bs = ([tensor.detach() for tensor in tensors] for tensors in (weights, As, Bs))
        ops.merge_and_reinit_(weights, As, Bs, scales, list(seeds), list(lows or ()), rounding == "stochastic")
