"""Gains in Triton's kernels: the forward pass, the pass before the backward one, and the norms of rows."""

import pytest
import torch

from fused_lora import reference
from fused_lora.kernels.dropout import Dropout
from fused_lora.kernels.gain_backward import gain_backward
from fused_lora.kernels.lora_linear import lora_linear_forward
from fused_lora.kernels.row_norms import row_norms
from tests.accuracy import assert_accurate
from tests.kernels.problem import DEVICE, gpus, randn
from tests.ops.layouts import base_offset, every_other_column, every_other_row, transposed

pytestmark = pytest.mark.interpreter

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATHS = [pytest.param(gpu, id=name) for name, gpu in gpus().items()]
GPU = next(iter(gpus().values()))  # of which these kernels ask the number of SMs alone
SCALE = 0.3


def gain_of(N):
    """Around 1, one of them negative."""
    gain = torch.rand(N, device=DEVICE) + 0.5
    gain[N // 2] *= -1
    return gain


@pytest.mark.parametrize("gpu", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(96, 128, 192, 16), (77, 101, 75, 5)], ids=str)
def test_forward(shape, p, bias, dtype, gpu):
    M, K, N, r = shape
    x, weight, A, B = (randn(*s, dtype=dtype, scale=s[1] ** -0.5) for s in ((M, K), (N, K), (r, K), (N, r)))
    gain, bias = gain_of(N), randn(N, dtype=dtype) if bias else None
    scale, seed = torch.tensor(SCALE, device=DEVICE), torch.tensor(5, device=DEVICE) if p else None
    y, _ = lora_linear_forward(x, weight, A, B, bias, scale, Dropout(p, seed), gpu, "ieee", gain)
    wide = [None if t is None else t.double() for t in (x, weight, A, B, bias)]
    exact = reference.lora_linear_ref(*wide, SCALE, p, seed, gain.double())
    assert_accurate("y", y, exact, reference.lora_linear_ref(x, weight, A, B, bias, SCALE, p, seed, gain))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [None, transposed, every_other_column, every_other_row, base_offset])
@pytest.mark.parametrize("shape", [(200, 75), (1, 1), (65, 300), (16, 256)], ids=str)
def test_gradients(shape, layout, bias, dtype):
    M, N = shape
    dy, y, gain = randn(M, N, dtype=dtype), randn(M, N, dtype=dtype), gain_of(N)
    bias = randn(N, dtype=dtype) if bias else None
    if layout is not None:
        dy, y = layout(dy), layout(y)
    got = gain_backward(dy, y, bias, gain, GPU, True)
    assert gain_backward(dy, y, bias, gain, GPU, False)[2] is None
    sums = y.double() - (0 if bias is None else bias.double())
    exact = dy.double() * gain.double(), (dy.double() * sums).sum(0) / gain.double(), dy.double().sum(0)
    by_torch = reference.gain_backward_ref(dy, y, bias, gain)
    for name, own, want, theirs in zip(("dsums", "dgain", "dbias"), got, exact, by_torch, strict=True):
        assert_accurate(name, own, want, theirs.to(own.dtype), roundings=4 if name != "dsums" else 0)


def test_a_gain_of_zero():
    gain = torch.tensor([0.0, 2.0], device=DEVICE)
    dy, y = randn(5, 2, dtype=torch.float32), randn(5, 2, dtype=torch.float32)
    y[:, 0] = 0
    for got in (
        gain_backward(dy, y, None, gain, GPU, False),
        reference.gain_backward_ref(dy, y, None, gain),
    ):
        assert not got[0][:, 0].any()
        assert got[1][0] == 0
        torch.testing.assert_close(got[1][1], (dy * y)[:, 1].sum() / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [None, transposed, every_other_column, base_offset])
@pytest.mark.parametrize("shape", [(75, 101, 5), (16, 256, 16), (33, 600, 72), (1, 8, 1), (40, 45, 512)], ids=str)
def test_norms_of_rows(shape, layout, dtype):
    N, K, r = shape
    weight, A, B = (randn(*s, dtype=dtype, scale=s[1] ** -0.5) for s in ((N, K), (r, K), (N, r)))
    if layout is not None:
        weight, A, B = layout(weight), layout(A), layout(B)
    scale = torch.tensor(2.5, device=DEVICE)
    got = row_norms(weight, A, B, scale, GPU)
    exact = (weight.double() + 2.5 * B.double() @ A.double()).norm(dim=1)
    assert_accurate("norms", got, exact, reference.row_norms_ref(weight, A, B, scale), roundings=8)


def test_norms_where_nothing_is_left():
    """W and its update cancel: by the sum of squares of both, most of the digits would be lost."""
    A, B = randn(4, 64, dtype=torch.float32), randn(20, 4, dtype=torch.float32)
    weight = -(B @ A) * (1 - 1e-3)
    got = row_norms(weight, A, B, torch.tensor(1.0, device=DEVICE), GPU)
    exact = (weight.double() + B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=0)
