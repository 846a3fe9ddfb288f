"""ReLoRA's restart of many layers as one op: their updates merged in place, their factors begun anew."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, checks, reference
from .library import define, launching, ops


def _merge_and_reinit(weights, As, Bs, scales, seeds, lows, stochastic):
    lows = lows or [None] * len(weights)
    layers = list(zip(weights, As, Bs, scales, seeds, lows, strict=True))
    by_kernel, by_reference = {}, []
    for i, layer in enumerate(layers):
        indices = by_kernel.setdefault(layer[0].device, []) if _has_kernel(*layer[:2]) else by_reference
        indices.append(i)
    done = []
    try:
        for i in by_reference:
            _by_reference(layers[i], stochastic)
            done.append(i)
        for device, indices in by_kernel.items():
            _by_kernel([layers[i] for i in indices], stochastic, device)
            done += indices
    except Exception as error:
        which = f"only {', '.join(map(str, done))}" if done else "none"
        message = f"of {len(layers)} layers {which} restarted, and all compute what they did: {error}"
        raise RuntimeError(message) from error


def _has_kernel(weight, A) -> bool:
    has_entries = weight.numel() > 0 and A.numel() > 0
    return has_entries and backends.choose_merge(weight.device, weight.dtype).name == "triton"


def _by_reference(layer, stochastic) -> None:
    weight, A, B, scale, seed, low = layer
    seed = torch.tensor(seed, device=weight.device)
    here = None if low is None else low.to(weight.device)
    reference.merge_and_reinit_ref_(weight, A, B, scale, seed, here, stochastic)
    if here is not low:
        low.copy_(here)


def _by_kernel(layers, stochastic, device) -> None:
    from ..kernels.merge_and_reinit import Layer, merge_and_reinit_

    try:
        with launching("merge_and_reinit", layers[0][0]):
            merge_and_reinit_([Layer(*layer) for layer in layers], stochastic, backends.gpu(device))
    finally:  # torch did not see the kernels write
        written = [tensor for weight, A, B, _, _, low in layers for tensor in (weight, A, B, low) if tensor is not None]
        torch.autograd.graph.increment_version(written)


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

    The product and the sum are computed in float32 (in float64 for such weights) and rounded once, and entries to which
    nothing is added keep their bits. What survives of an update depends on how small it is beside the weight:

    * rounding="nearest": in 16 bits, whatever is below half a unit in the last place is lost.
    * rounding="stochastic": up or down, each as likely as it is near. Unbiased, and noisier than the nearest.
    * lows: the sum goes on in two halves, weight and an int16 beside it (zeros to begin with), and nothing is lost.
      reference.split says how. For all layers or for none; of 16-bit weights.

    A and the rounding come from a counter-based generator: the same seed gives the same numbers on every rank and
    device. Keeps every data_ptr and moves the version counters. On a GPU all of its memory is taken and all kernels are
    loaded before the first change. If it fails half-way all the same, the error says which layers have restarted, and
    weight + scale B A of every layer is as it was, since what is merged is gone from B: it can be called again.
    Raises ValueError or TypeError naming the layer and the argument before anything is changed.
    ReLoRA: Lialin et al. 2023, arXiv:2307.05695.
    """
    checks.check_restart(weights, As, Bs, scales, seeds, lows or [None] * len(weights), rounding)
    if not weights:
        return
    with torch.no_grad():
        scales = [
            torch.as_tensor(scale, dtype=checks.scale_dtype(weight), device=weight.device)
            for scale, weight in zip(scales, weights, strict=True)
        ]
        weights, As, Bs = ([tensor.detach() for tensor in tensors] for tensors in (weights, As, Bs))
        ops.merge_and_reinit_(weights, As, Bs, scales, list(seeds), list(lows or ()), rounding == "stochastic")
