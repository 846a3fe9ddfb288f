"""Dtypes: every mix of base and factors, under autocast and not, against PEFT's layer where that gives a result."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from fused_lora import lora_linear
from fused_lora.reference import lora_linear_ref
from tests.accuracy import assert_accurate
from tests.ops.problem import DEVICES, SCALE, cast, make_dy, make_inputs, run, unfused

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
R, ALPHA = 8, 8 * SCALE


def autocast(device, dtype):
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def peft_layer(inputs, train):
    """peft.tuners.lora.Linear on the same tensors."""
    peft = pytest.importorskip("peft")
    weight = inputs["weight"]
    base = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    base.weight, base.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(inputs["bias"].detach())
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"])
    layer = peft.inject_adapter_in_model(config, nn.Sequential(base))[0]
    layer.lora_A["default"].weight = nn.Parameter(inputs["A"].detach())
    layer.lora_B["default"].weight = nn.Parameter(inputs["B"].detach())
    return layer.train(train)


def by_peft(layer, x, dy, context):
    """PEFT's results under the names that run() gives them."""
    with context:
        y = layer(x)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    grads = torch.autograd.grad(y, (x, A, B), dy.to(y.dtype))
    return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *grads), strict=True))


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dtype", "lora_dtype"), list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_as_peft(dtype, lora_dtype, autocast_dtype, train, device):
    inputs = make_inputs(60, 48, 40, R, device, dtype, lora_dtype)
    inputs["bias"].requires_grad_(False)
    dy = make_dy(inputs)
    peft = by_peft(peft_layer(inputs, train), inputs["x"], dy, autocast(device, autocast_dtype))
    with autocast(device, autocast_dtype):
        y = lora_linear(**inputs, scale=SCALE)
    grads = torch.autograd.grad(y, [inputs[name] for name in ("x", "A", "B")], dy.to(y.dtype))
    exact = run(lora_linear_ref, cast(inputs, torch.float64), dy.to(y.dtype).double(), scale=SCALE)
    # Outside autocast PEFT computes the update in the factors' dtype, here it is done in x's.
    finer = autocast_dtype is None and torch.finfo(lora_dtype).eps < torch.finfo(dtype).eps
    held_to = run(unfused, inputs, dy, scale=SCALE) if finer else peft
    for name, value in zip(("y", "dx", "dA", "dB"), (y.detach(), *grads), strict=True):
        assert value.dtype is peft[name].dtype, f"{name}: {value.dtype}, PEFT's {peft[name].dtype}"
        assert_accurate(name, value, exact[name], held_to[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("x_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
def test_autocast_of_x_and_weight(x_dtype, weight_dtype, device):
    """As torch.nn.functional.linear: the dtype is autocast's, whatever x and weight are."""
    inputs = make_inputs(60, 48, 40, R, device, x_dtype)
    dy = make_dy(inputs).to(torch.bfloat16)
    inputs["weight"] = inputs["weight"].to(weight_dtype)

    def all_in_half(x, weight, A, B, bias):
        half = (t.to(torch.bfloat16) for t in (x, weight, A, B, bias))
        return lora_linear_ref(*half, scale=SCALE)

    def under_autocast(**inputs):
        with torch.autocast(device, torch.bfloat16):
            return lora_linear(**inputs, scale=SCALE)

    got, by_torch = run(under_autocast, inputs, dy), run(all_in_half, inputs, dy)
    exact = run(lora_linear_ref, cast(inputs, torch.float64), dy.double(), scale=SCALE)
    for name, value in got.items():
        assert value.dtype is by_torch[name].dtype
        assert_accurate(name, value, exact[name], by_torch[name])


def test_float64_stays_out_of_autocast():
    inputs = make_inputs(6, 5, 4, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**inputs, scale=SCALE)
    assert y.dtype is torch.float64
    torch.testing.assert_close(y, lora_linear_ref(**inputs, scale=SCALE), rtol=1e-12, atol=1e-12)


def test_backward_under_autocast_is_the_backward_outside():
    inputs = make_inputs(30, 20, 10, 3)
    dy = make_dy(inputs)
    outside = run(lora_linear, inputs, dy, scale=SCALE)
    y = lora_linear(**inputs, scale=SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(dy)
    for name in ("x", "A", "B", "bias"):
        assert torch.equal(inputs[name].grad, outside[f"d{name}"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("r", [4, 16, 64])
@pytest.mark.parametrize("rows", [8, 9000])
@pytest.mark.parametrize("scale", [64.0, 100.0, 3.0, -64.0])
def test_float16_is_finite_where_the_unfused_layer_is(scale, rows, r, device):
    """x A^T = 1280 and a scale of 64 are more than float16 holds."""
    if device == "cpu" and rows > 8:
        pytest.skip("of the kernels' tiles")
    inputs = make_inputs(rows, 64, 72, r, device, torch.float16)
    x, A = inputs["x"].data.fill_(4.0), inputs["A"].data.fill_(5.0)
    assert (x @ A.T == 1280).all()
    for B in (torch.zeros(72, r), torch.randn(72, r) * 1e-3):
        inputs["B"].data.copy_(B)
        dy = make_dy(inputs) * 1e-3
        got = run(lora_linear, inputs, dy, scale=scale)
        assert all(value.isfinite().all() for value in got.values())
        exact = run(lora_linear_ref, cast(inputs, torch.float64), dy.double(), scale=scale)
        for name in ("y", "dx", "dA"):
            torch.testing.assert_close(got[name].double(), exact[name], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got["dB"].double(), exact["dB"].clamp(-65504, 65504), rtol=2e-2, atol=2.0)
