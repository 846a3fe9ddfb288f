"""The addmm backend against the reference in float64: forward, backward, masks, and by the name of a backend."""

import pytest
import torch

from fused_lora import addmm, backends, explain, lora_linear, reference

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SCALE = torch.tensor(0.7)


def operands(M, K, N, r, dtype, factor_dtype):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(M, K), torch.randn(N, K), torch.randn(M, N)
    A, B, bias = torch.randn(r, K), torch.randn(N, r), torch.randn(N)
    x, weight, dy = (tensor.to(dtype) for tensor in (x, weight, dy))
    return x, weight, A.to(factor_dtype), B.to(factor_dtype), bias, dy


def assert_close(got, expected, dtype):
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert error < BOUNDS[dtype]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [(70, 33, 41, 5), (1, 8, 3, 1), (300, 130, 64, 16)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "factor_dtype"),
    [
        (torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
    ],
)  # fmt: skip
def test_a_layer(dtype, factor_dtype, sizes, p, monkeypatch):
    monkeypatch.setattr(addmm, "MASKED_AT_ONCE", 64 * sizes[1])  # so that masks are made in parts
    seed = torch.tensor(2**40 + 7) if p else None
    x, weight, A, B, bias, dy = operands(*sizes, dtype, factor_dtype)
    exact = [tensor.double() for tensor in (x, weight, A, B, bias)]
    y, xa = addmm.lora_linear_forward(x, weight, A, B, bias, SCALE, seed, p)
    expected_y, expected_xa = reference.lora_linear_forward_ref(*exact, SCALE, seed, p)
    assert (y.dtype, xa.dtype) == (dtype, dtype)
    assert_close(y, expected_y, dtype)
    assert_close(xa, expected_xa, dtype)
    needs = (True, True, True)
    grads = addmm.lora_linear_backward(dy, x, weight, A, B, xa, SCALE, seed, p, needs)
    expected = reference.lora_linear_backward_ref(dy.double(), *exact[:4], xa.double(), SCALE, seed, p, needs)
    for got, want, like in zip(grads, expected, (x, A, B, x), strict=True):
        assert got.dtype == like.dtype
        assert_close(got, want, dtype)


def test_only_what_is_wanted():
    x, weight, A, B, _, dy = operands(20, 9, 7, 3, torch.float32, torch.float32)
    xa = x @ A.T
    for i in range(3):
        needs = tuple(i == j for j in range(3))
        given = torch.randn(20, 3)
        *grads, dxa = addmm.lora_linear_backward(dy, x, weight, A, B, xa, SCALE, None, 0.0, needs, given)
        assert [grad is not None for grad in grads] == list(needs)
        assert dxa is given


@pytest.mark.parametrize("scale", [0.5, 2.0, 96.0])
def test_float16_keeps_low_finite(scale):
    x, weight, A, B, _, dy = operands(40, 64, 24, 4, torch.float16, torch.float16)
    A = A * 60
    y, xa = addmm.lora_linear_forward(x, weight, A, B, None, torch.tensor(scale), None, 0.0)
    expected_y, expected_xa = reference.lora_linear_forward_ref(x, weight, A, B, None, torch.tensor(scale), None, 0.0)
    assert_close(xa, expected_xa, torch.float16)
    finite = expected_y.isfinite()
    assert_close(y[finite], expected_y[finite], torch.float16)
    needs = (False, False, True)
    dB = addmm.lora_linear_backward(dy, x, weight, A, B, xa, torch.tensor(scale), None, 0.0, needs)[2]
    low = scale * x.double() @ A.double().T
    expected_dB = dy.double().T @ low
    finite = dB.isfinite()
    assert finite.any()
    # What fits is what many sums have left of each other: errors are those of the sums.
    assert (dB.double() - expected_dB)[finite].norm() / expected_dB.norm() < BOUNDS[torch.float16]


def test_a_mask_begins_where_its_rows_do():
    x, seed = torch.ones(50, 30), torch.tensor(11)
    whole = reference.dropout(x, 0.5, seed)
    assert torch.equal(reference.dropout(x[20:], 0.5, seed, 20), whole[20:])
    assert not torch.equal(reference.dropout(x[20:], 0.5, seed), whole[20:])


def test_by_name(monkeypatch):
    monkeypatch.setenv("FUSED_LORA_BACKEND", "addmm")
    called = []
    forward = addmm.lora_linear_forward
    monkeypatch.setattr(addmm, "lora_linear_forward", lambda *given: called.append(1) or forward(*given))
    x, weight, A, B, bias, dy = operands(6, 10, 12, 2, torch.float32, torch.float32)
    for tensor in (x, A, B, bias):
        tensor.requires_grad_()
    grads = torch.autograd.grad(lora_linear(x, weight, A, B, bias, 0.7), (x, A, B, bias), dy)
    monkeypatch.setenv("FUSED_LORA_BACKEND", "reference")
    expected = torch.autograd.grad(lora_linear(x, weight, A, B, bias, 0.7), (x, A, B, bias), dy)
    assert called == [1]
    for got, want in zip(grads, expected, strict=True):
        assert_close(got, want, torch.float32)


def test_it_is_explained(monkeypatch):
    monkeypatch.setenv("FUSED_LORA_BACKEND", "addmm")
    told = explain(in_features=32, out_features=48, r=8, tokens=64, device="cpu")
    assert (told.backend, told.reason) == ("addmm", "FUSED_LORA_BACKEND=addmm")
    assert backends.choose_merge(torch.device("cpu"), torch.float32).name != "addmm"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_scale_is_not_rounded_to_16_bits(device):
    """0.3 in bfloat16 is 0.30078: products of it are wrong by an eighth of a percent, all in one direction."""
    scale = torch.tensor(0.3, device=device)
    x = torch.full((4, 1), 3.0, dtype=torch.bfloat16, device=device)
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    want = torch.tensor(3.0 * 0.3).bfloat16().item()
    _, xa = addmm.lora_linear_forward(x, one, one, one, None, scale, None, 0.0)
    *_, dxa = addmm.lora_linear_backward(x, x, one, one, one, xa, scale, None, 0.0, (True, True, True))
    for got in (xa, dxa, reference.times(x, scale), reference.times(x, 0.3)):
        assert set(got.flatten().tolist()) == {want}
