"""cuBLAS's kernels for compute capability 8, by number: the products that they are asked for, and by mma.sync."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench.cublas_sm80 import CublasLt, Product

M, N, K = 512, 384, 256
SHARED_BYTES = 99 * 1024


@pytest.fixture(scope="module")
def lt():
    return CublasLt()


def random(rows, cols):
    return torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize(("lhs_turned", "rhs_turned"), [(False, False), (False, True), (True, False)])
def test_a_product(lt, lhs_turned, rhs_turned, beta):
    lhs = random(K, M).T if lhs_turned else random(M, K)
    rhs = random(N, K).T if rhs_turned else random(K, N)
    out = random(M, N)
    flush = torch.empty(1 << 20, dtype=torch.int8, device="cuda")
    product = Product(lt, lhs, rhs, out, beta=beta, alpha=0.5).tune(SHARED_BYTES, flush)
    before = out.copy_(random(M, N)).double()
    if beta == 0:
        out.fill_(float("nan"))
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        product()
        torch.cuda.synchronize()
    expected = 0.5 * lhs.double() @ rhs.double() + beta * before
    assert (out.double() - expected).norm() / expected.norm() < 5e-3
    assert any("16816" in event.key for event in profiled.key_averages())
