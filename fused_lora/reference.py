"""Every operation in plain torch: the specification, and what runs on a CPU.

Symbols: x (M, K), W (N, K) frozen, A (r, K), B (N, r), scale a float32 scalar; p and seed describe dropout.
16-bit inputs are computed in float32 and rounded once per result; float32 and float64 in their own precision.
LoRA: Hu et al. 2021, arXiv:2106.09685.
"""

import math

import torch
from torch import Tensor

from .formats.products import linear, times_weight, whole
from .hashing import half_bits, hash_bits, kept, mask_numbers, mask_threshold


def keep_mask(M: int, K: int, p: float, seed: Tensor, first: int = 0) -> Tensor:
    """(M, K) bool, True with probability 1 - p."""
    return kept(mask_numbers(M, K, seed, first), mask_threshold(p))


def uniform(rows: int, cols: int, bound: float, seed: Tensor) -> Tensor:
    """(rows, cols) float32, uniform in (-bound, bound), symmetric and never zero."""
    odd = 2 * (hash_bits(rows, cols, seed) >> 8) + 1 - 2**24
    return odd.float() * (bound / 2**24)


def new_A(r: int, K: int, seed: Tensor) -> Tensor:
    """A factor's beginning: (r, K) float32, uniform in (-1, 1) / sqrt(K)."""
    return uniform(r, K, max(K, 1) ** -0.5, seed)


def dropout(x: Tensor, p: float, seed: Tensor | None, first: int = 0) -> Tensor:
    """x (M, K), rows from `first` on: entries zeroed where keep_mask says so, the others divided by 1 - p."""
    if seed is None:
        return x
    if p == 1:
        return torch.zeros_like(x)
    return torch.where(keep_mask(*x.shape, p, seed, first), x / (1 - p), 0)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a product of a dtype is summed."""
    return torch.float32 if dtype.itemsize == 2 else dtype


def room(scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Float16 ends at 65,504: the power of two above a scale above 1, which stays out of xa there; else None.

    xa is then never larger than it is without a scale.
    """
    if dtype is not torch.float16:
        return None
    return torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent.clamp(min=0))


def times(product: Tensor, scale: float | Tensor) -> Tensor:
    """scale * product in product's dtype, rounded once: torch rounds a scale without dimensions to 16 bits on a GPU."""
    if not isinstance(scale, Tensor):
        return product * scale
    return (product * scale.reshape(1)).to(product.dtype)


def lora_linear_forward_ref(x, weight, A, B, bias, scale, seed, p, gain=None):
    """(y, xa) with y = gain (x W^T + xa B^T) + bias and xa = scale * dropout(x) A^T, rounded to x's dtype before its
    use.

    In float16 xa is scale / room of it, and room enters y and dB.
    """
    compute = compute_dtype(x.dtype)
    xc, up, more = x.to(compute), B.to(compute), room(scale, x.dtype)
    if more is not None:
        scale, up = scale / more, up * more
    xa = (dropout(xc, p, seed) @ A.to(compute).T).mul_(scale).to(x.dtype)
    if gain is None:
        return linear(x, weight, compute, bias).addmm_(xa.to(compute), up.T).to(x.dtype), xa
    y = linear(x, weight, compute).addmm_(xa.to(compute), up.T)
    return with_gain(y, gain, bias).to(x.dtype), xa


def with_gain(sums, gain, bias):
    """gain sums + bias, by columns."""
    y = sums * gain
    return y if bias is None else y + bias


def gain_backward_ref(dy, y, bias, gain):
    """(gain dy rounded to dy's dtype, dgain, dbias) of y = gain sums + bias: dgain = sum over rows of dy sums.

    The sums are taken from y: a gain of 0 leaves nothing of them, and its own gradient is 0.
    """
    compute = compute_dtype(dy.dtype)
    dyc, sums = dy.to(compute), y.to(compute) if bias is None else y.to(compute) - bias.to(compute)
    dgain = torch.where(gain == 0, 0, (dyc * sums).sum(0) / gain)
    return (dyc * gain).to(dy.dtype), dgain.to(gain.dtype), dyc.sum(0)


def row_norms_ref(weight, A, B, scale):
    """The Euclidean norms of the rows of W + scale B A, (N,) in at least float32, and as large as can be divided by;
    factors as kernels read them, in W's dtype."""
    compute = compute_dtype(weight.dtype)
    low, up = A.to(weight.dtype).to(compute), B.to(weight.dtype).to(compute)
    norms = torch.linalg.vector_norm(weight.to(compute) + scale.to(compute) * (up @ low), dim=1)
    return norms.clamp(min=SMALLEST_NORM)


# The smallest normal number of float32.
SMALLEST_NORM = 2.0**-126


def dxa_ref(dy, B, scale):
    """scale * dy B, rounded to dy's dtype."""
    compute = compute_dtype(dy.dtype)
    return (dy.to(compute) @ B.to(compute)).mul_(scale).to(dy.dtype)


def lora_linear_backward_ref(dy, x, weight, A, B, xa, scale, seed, p, needs, dxa=None):
    """(dx, dA, dB, dxa), of the first three None where `needs` (three bools) says so.

    dxa = scale * dy B, rounded to x's dtype, where it is not given.

    dx = dy W + mask(dxa A) / (1 - p),  dA = dxa^T dropout(x),  dB = dy^T xa.
    """
    need_dx, need_dA, need_dB = needs
    compute = compute_dtype(x.dtype)
    dyc = dy.to(compute)
    if dxa is None:
        dxa = dxa_ref(dy, B, scale)
    low = dxa.to(compute)
    dx = dA = dB = None
    if need_dx:
        dx = times_weight(dy, weight, compute)
        if seed is None:
            dx.addmm_(low, A.to(compute))
        else:
            dx += dropout(low @ A.to(compute), p, seed)
        dx = dx.to(x.dtype)
    if need_dA:
        dA = (low.T @ dropout(x.to(compute), p, seed)).to(A.dtype)
    if need_dB:
        more = room(scale, x.dtype)
        dB = (dyc.T @ xa.to(compute)).mul_(1 if more is None else more).to(B.dtype)
    return dx, dA, dB, dxa


def lora_linear_ref(x, weight, A, B, bias=None, scale=1.0, p=0.0, seed=None, gain=None):
    """y = gain (x W^T + scale dropout(x) A^T B^T) + bias by torch's autograd: what the tests hold the kernels to."""
    flat = x.reshape(-1, x.shape[-1])
    y = flat @ whole(weight, x.dtype).T + times(dropout(flat, p, seed) @ A.T, scale) @ B.T
    if gain is not None:
        y = (y * gain).to(y.dtype)
    if bias is not None:
        y = y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0])


# act(t) = t sigmoid(t (linear + cubic t^2)): SiLU, and GELU in its tanh form, whose tanh is a sigmoid.
ACTIVATIONS = {"silu": (1.0, 0.0), "gelu_tanh": (2 * (2 / math.pi) ** 0.5, 2 * (2 / math.pi) ** 0.5 * 0.044715)}


def gated(gate, up, linear, cubic):
    """act(gate) up, rounded once."""
    compute = compute_dtype(gate.dtype)
    t = gate.to(compute)
    return (t * torch.sigmoid(t * (linear + cubic * t * t)) * up.to(compute)).to(gate.dtype)


def _value_and_slope(t, linear, cubic):
    square = (cubic * t * t).clamp(max=1e30)  # an infinite one times 0 would be NaN
    s = torch.sigmoid(t * (linear + square))
    return t * s, s + t * s * (1 - s) * (linear + 3 * square)


def gated_factors(gate, up, linear, cubic):
    """(act(gate), act'(gate) up): times the gradient of act(gate) up they are up's and gate's. Finite in float16, or a
    gradient of 0 would become NaN."""
    compute = compute_dtype(gate.dtype)
    value, slope = _value_and_slope(gate.to(compute), linear, cubic)
    of_gate = slope * up.to(compute)
    if gate.dtype is torch.float16:
        of_gate = of_gate.clamp(-65504, 65504)
    return value.to(gate.dtype), of_gate.to(gate.dtype)


def gated_backward(dhidden, gate, up, linear, cubic):
    """(dgate, dup) from the gradient of act(gate) up."""
    compute = compute_dtype(gate.dtype)
    value, slope = _value_and_slope(gate.to(compute), linear, cubic)
    d = dhidden.to(compute)
    return (d * (slope * up.to(compute))).to(gate.dtype), (d * value).to(up.dtype)


# From gate's and up's seed to down's: with the next seed, its mask would be theirs with rows exchanged.
DOWN_SEED = 2**32


def lora_mlp_ref(x, gate, up, down, act, p=0.0, seed=None):
    """down(act(gate(x)) up(x)) by torch's own autograd; gate, up and down are lora_linear_ref's other arguments."""
    hidden = act(lora_linear_ref(x, **gate, p=p, seed=seed)) * lora_linear_ref(x, **up, p=p, seed=seed)
    return lora_linear_ref(hidden, **down, p=p, seed=None if seed is None else seed + DOWN_SEED)


def merge_ref_(weight, A, B, scale):
    """weight += scale * B A in place: product and sum in at least float32, one rounding to weight's dtype.

    Entries to which nothing is added keep their bits. A and B may have any floating dtype.
    """
    weight.copy_(_merged(weight, A, B, scale, None, None)[0])


def merge_and_reinit_ref_(weight, A, B, scale, seed, low=None, stochastic=False):
    """weight += scale * B A in place as merge_ref_ does, then A uniform in (-1, 1) / sqrt(K) from `seed`, and B = 0.

    The sum's rounding is to the nearest; stochastic, in 16 bits to either neighbour, so that its mean is exact (from
    seed + 1); with `low`, the int16 remainder of weight (split), nothing is lost: the sum goes on in (weight, low).
    """
    new_weight, new_low = _merged(weight, A, B, scale, low, seed + 1 if stochastic else None)
    beginning = new_A(*A.shape, seed).to(A.dtype)
    # Nothing below allocates: a layer restarts wholly or not at all.
    weight.copy_(new_weight)
    if low is not None:
        low.copy_(new_low)
    A.copy_(beginning)
    B.zero_()


def _merged(weight, A, B, scale, low, seed):
    compute = compute_dtype(weight.dtype)
    delta = scale.to(compute) * (B.to(compute) @ A.to(compute))
    added = (weight.to(compute) if low is None else join(weight, low)) + delta
    if low is not None:
        high, rest = split(added, weight.dtype)
        return torch.where(delta == 0, weight, high), torch.where(delta == 0, low, rest)
    rounds_randomly = seed is not None and weight.dtype.itemsize == 2
    high = round_randomly(added, weight.dtype, seed) if rounds_randomly else added.to(weight.dtype)
    return torch.where(delta == 0, weight, high), None


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbours in a 16-bit dtype around float32 values, as float32."""
    mantissa, smallest = (7, -126) if dtype is torch.bfloat16 else (10, -14)
    exponent = torch.where(values == 0, smallest, torch.frexp(values).exponent - 1)
    return torch.ldexp(torch.ones_like(values), exponent.clamp(min=smallest) - mantissa)


def split(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 as (high, low): high its rounding to a 16-bit dtype, ties away from zero, and low the rest as an int16.

    In bfloat16 low is the difference of the bits, and join gives back every float32 (of a NaN, a NaN). In float16 it is
    the difference of the magnitudes in units of high's ulp / 2^16, and join is exact from 2^-17 on and within 2^-41
    below; where high is not finite, low is 0.
    """
    if dtype is torch.bfloat16:
        bits = torch.where(values.isnan(), torch.nan, values).view(torch.int32).to(torch.int64)
        high = (bits + 2**15) >> 16
        return high.to(torch.int16).view(dtype), (bits - high * 2**16).to(torch.int16)
    high = values.to(dtype)
    tie = _rest(values, high) == 2**15  # which went to the even neighbour, here toward zero
    high = torch.where(tie, (high.view(torch.int16) + 1).view(dtype), high)
    low = _rest(values, high)
    high = torch.where(values.isfinite(), high, values.to(dtype))
    return high, torch.where(high.isfinite(), low, 0).to(torch.int16)


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 that split gave."""
    if high.dtype is torch.bfloat16:
        return (high.view(torch.int16).to(torch.int32) * 2**16 + low).view(torch.float32)
    wide = high.float()
    magnitude = wide.abs() + low.float() * (_ulp(wide, high.dtype) / 2**16)
    return torch.where(wide.isfinite(), torch.copysign(magnitude, wide), wide)


def _rest(values: Tensor, high: Tensor) -> Tensor:
    wide = high.float()
    return ((values.abs() - wide.abs()) / _ulp(wide, high.dtype) * 2**16).round()


def round_randomly(values: Tensor, dtype: torch.dtype, seed: Tensor) -> Tensor:
    """float32 (N, K) to one of its two neighbours in a 16-bit dtype, each as likely as it is near: unbiased."""
    ulp = _ulp(values, dtype)
    steps = values.abs() / ulp
    below = steps.floor()
    up = (steps - below + half_bits(*values.shape, seed).float() / 2**16).floor()
    rounded = torch.copysign((below + up) * ulp, values)
    return torch.where(values.isfinite(), rounded, values).to(dtype)
