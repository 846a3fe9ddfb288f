"""The promise of docs/kernels.md: no temporary the size of an activation or of the weight."""

import gc

import pytest
import torch
from torch.nn import functional as F

from fused_lora import lora_linear
from fused_lora.kernels.tiles import MAX_SLICES

ALLOCATOR_ROUNDING = 8 * 512  # bytes: blocks come in multiples of 512


def peak_of(step) -> int:
    step()  # compiles
    gc.collect()  # what waits to be freed would be freed within the step
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_peak_above_the_frozen_linear(lora_dtype, p):
    M, K, N, r = 16384, 1024, 2048, 16
    x = torch.randn(M, K, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(N, K, dtype=torch.bfloat16, device="cuda")
    A = torch.randn(r, K, dtype=lora_dtype, device="cuda", requires_grad=True)
    B = torch.randn(N, r, dtype=lora_dtype, device="cuda", requires_grad=True)
    dy = torch.randn(M, N, dtype=torch.bfloat16, device="cuda")
    scale = torch.tensor(0.5, device="cuda")

    def frozen():
        return torch.autograd.grad(F.linear(x, weight), x, dy)

    def fused():
        return torch.autograd.grad(lora_linear(x, weight, A, B, scale=scale, p=p), (x, A, B), dy)

    factors = r * (K + N)
    low_rank, gradients = 2 * M * r * 2, factors * A.element_size()
    casts = 0 if lora_dtype is torch.bfloat16 else factors * 2
    slices = MAX_SLICES * factors * 4
    allowed = low_rank + gradients + casts + slices + ALLOCATOR_ROUNDING
    assert allowed < M * K * 2  # or the bound would hide an activation
    assert peak_of(fused) - peak_of(frozen) <= allowed
