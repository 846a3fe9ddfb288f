"""The in-place merge as an op."""

import torch
from torch import Tensor

from .. import backends, checks, reference
from .library import define, launching, ops


def _merge(weight, A, B, scale):
    backend = backends.choose_merge(weight.device, weight.dtype).name if weight.numel() > 0 else "reference"
    if backend == "reference":
        return reference.merge_ref_(weight, A, B, scale)
    # The kernels read both factors in one dtype: the weight's, or else float32, in which they compute.
    factor_dtype = weight.dtype if A.dtype == B.dtype == weight.dtype else torch.float32
    A, B = A.to(factor_dtype), B.to(factor_dtype)
    if backend == "triton":
        from ..kernels.merge import merge_ as merge_kernel_

        with launching("merge", weight):
            merge_kernel_(weight, A, B, scale, backends.gpu(weight.device))
    else:
        ops.cuda_merge_(weight, A.contiguous(), B.contiguous(), scale)
    # torch did not see the kernel write: a backward that saved the weight must find out.
    torch.autograd.graph.increment_version(weight)


define("merge_(Tensor(a!) weight, Tensor A, Tensor B, Tensor scale) -> ()", _merge, lambda weight, A, B, scale: None)


def merge_(weight: Tensor, A: Tensor, B: Tensor, scale: float | Tensor) -> Tensor:
    """weight += scale * B A in place and returned: fp32 product and sum, one rounding to weight's dtype.

        weight (N, K) bf16 | fp16 | fp32 | fp64, any strides   A (r, K), B (N, r) in any floating dtypes

    Keeps data_ptr, moves the version counter (a backward that saved weight raises), leaves bit for bit every entry
    to which nothing is added. In 16 bits each merge rounds: an update below half a unit in the last place is lost.
    Raises ValueError or TypeError naming the argument before anything is changed.
    ReLoRA: Lialin et al. 2023, arXiv:2307.05695.
    """
    checks.check_factors(weight, A, B)
    checks.check_writable("weight", weight)
    checks.check_scale_on("scale", scale, weight)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=checks.scale_dtype(weight), device=weight.device)
    with torch.no_grad():
        ops.merge_(weight, A.detach(), B.detach(), scale)
    return weight
