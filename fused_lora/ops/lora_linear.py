"""The LoRA linear: one part."""

from torch import Tensor

from .. import checks
from . import eager, recomputed, short
from . import parts as of_parts
from .autograd import apply
from .parts import Part


def _in_csrc(x, weight, A, B, bias, scale, seed, p, gain) -> Tensor | None:
    """y by csrc's autograd, if the call is for it."""
    extension = eager.csrc()
    if extension is None or not isinstance(x, Tensor) or not x.is_cuda or not eager.is_probability(p):
        return None
    for tensor in (weight, A, B, scale):
        if not isinstance(tensor, Tensor):
            return None
    for tensor in (bias, seed, gain):
        if tensor is not None and not isinstance(tensor, Tensor):
            return None
    return extension.lora_linear(x, weight, A, B, bias, scale, seed, p, gain)


def _directly(x, weight, A, B, bias, scale, seed, p, gain) -> Tensor | None:
    """y without a look at the arguments but the short ones; None: something is wrong, or for another backend."""
    y = _in_csrc(x, weight, A, B, bias, scale, seed, p, gain)
    if y is not None or gain is not None:  # of which the other short way knows nothing
        return y
    return short.lora_linear(x, weight, A, B, bias, scale, p, seed)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """y = gain (x W^T + scale dropout(x) A^T B^T) + bias, fp32 accumulation, one rounding (two by torch's products).

        x (..., K) bf16 | fp16 | fp32 | fp64, any strides   weight (N, K) in x's dtype, frozen   bias (N,) or None
        A (r, K), B (N, r) in any floating dtype, 1 <= r <= 512; computed in x's dtype   ->   y (..., N) in x's dtype

    scale is lora_alpha / r: a float, or a 0-dim float32 tensor on x's device (float64 beside float64), with which a new
    value costs nothing (no fill, no recompilation). p is the probability of dropping an entry of x on its way to A; its
    mask is a hash of (seed, row, column), seed a 0-dim int64 tensor, drawn from torch's generator when None. Pass p=0
    to evaluate. gain (N,), or None for 1, is float32 (float64 beside float64) and multiplies the columns of the sum, as
    DoRA does (arXiv:2402.09353); a gain of 0 has a gradient of 0, since nothing is left of what it multiplied.

    Gradients: dxa = scale dy B, dx = dy W + mask(dxa A) / (1 - p), dA = dxa^T dropout(x), dB = dy^T xa, in the
    dtypes of x, A and B, and that of bias. Saves x and xa = scale dropout(x) A^T (M, r). With a gain dy is gain dy
    there, dgain = sum of dy (y - bias) / gain over rows, and y is saved where it is wanted. Second derivatives,
    forward-mode ones and torch.func's transformations are computed by the formula in plain torch.

    Raises ValueError or TypeError naming the argument for a shape, dtype or device, and for a weight that is a
    parameter and requires gradients. A weight that was made from such a one has its gradient by the formula too.
    LoRA: Hu et al. 2021, arXiv:2106.09685.
    """
    if isinstance(x, Tensor) and of_parts.autocast_dtype(x) is not None:
        x, ((weight, A, B, bias, scale, *_),) = of_parts.autocast(x, [Part(weight, A, B, bias, scale)])
    is_long = gain is None and recomputed.is_worth(x, weight)  # which the short ways know nothing of
    y = None if is_long else _directly(x, weight, A, B, bias, scale, seed, p, gain)
    if y is not None:
        return y
    part = Part(weight, A, B, bias, scale, gain=gain)
    checks.check_lora_linear(x, *part[:5], p, seed, gain)
    seed = of_parts.drawn_seed(x, p, seed)
    return apply(x, of_parts.complete(x, [part], seed), p)[0]
