"""The promises of docs/hopper.md, sm80.md and kernels.md: workspaces by their sizes, none as large as an activation."""

import gc

import pytest
import torch
from torch.nn import functional as F

from fused_lora import backends, lora_linear
from tests.csrc.passes import Part, Pass, promised_floats

M, K, N, r = 16384, 1024, 2048, 16
ALLOCATOR_ROUNDING = 10 * 512  # bytes: blocks come in multiples of 512


def peak_of(step) -> int:
    torch.cuda.empty_cache()  # a block of another test's could be larger than what is asked for
    step()  # compiles
    gc.collect()  # what waits to be freed would be freed within the step
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def csrc_sums() -> int:
    """Bytes of partial sums that a backward pass of csrc's is promised to take."""
    part = Part(K, N, r, wants_a=True, wants_b=True)
    return 4 * promised_floats(Pass(M, True, False, True, False, 256, 66, (part,), 1))


def halves(gpu) -> int:
    """Of what csrc/sm80 cuts in two (csrc/work/halves.h): 128 KB each, half as many as SMs and 16 more."""
    return (gpu.sm_count // 2 + 16) * 256 * 128 * 4 if gpu.capability < 90 else 0


def triton_sums(gpu, p: float) -> int:
    """The same of the Triton kernels: slices of dA and dB, as they are cut for this card."""
    from fused_lora.kernels import tiles
    from fused_lora.kernels.factor_grads import SplitGrad

    together = gpu.has_tma and p == 0  # with the tiles of dx, whose number of warps counts
    warps = tiles.expand_tile(M, K, gpu, 2, True, "ieee").num_warps if together else 8
    tile = tiles.factor_grad_tile(r, gpu, 2, "ieee", warps)
    grads = SplitGrad.plan(M, N, K, r, tile, gpu, 2)
    return sum(4 * grad.splits * grad.shape[0] * grad.shape[1] for grad in grads if grad.splits > 1)


def allowed(sums: int, lora_dtype: torch.dtype) -> int:
    """Bytes above a frozen linear's: xa and dxa, dA and dB, factors in x's dtype, partial sums."""
    factors = r * (K + N)
    casts = 0 if lora_dtype is torch.bfloat16 else factors * 2
    total = 2 * M * r * 2 + factors * lora_dtype.itemsize + casts + sums + ALLOCATOR_ROUNDING
    assert total < M * K * 2, "the bound would hide an activation"
    return total


def test_one_more_copy_of_the_sums_is_more_than_is_allowed():
    assert ALLOCATOR_ROUNDING < 4 * r * (K + N) <= csrc_sums() < 2 * 4 * r * (K + N)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("lora_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_peak_above_the_frozen_linear(backend, lora_dtype, p, monkeypatch, request):
    device = torch.device("cuda", torch.cuda.current_device())
    if backend == "cuda":
        request.getfixturevalue("on_hopper")
    monkeypatch.setenv("FUSED_LORA_BACKEND", backend)
    assert backends.choose_lora_linear(device, torch.bfloat16, r).name == backend
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

    gpu = backends.gpu(device)
    sums = csrc_sums() + halves(gpu) if backend == "cuda" else triton_sums(gpu, p)
    assert peak_of(fused) - peak_of(frozen) <= allowed(sums, lora_dtype)
