"""Values, gradients, memory layouts and empty sizes of the op, against float64."""

import pytest
import torch

from fused_lora import lora_linear
from tests.ops.layouts import BIAS_LAYOUTS, LAYOUTS, contiguous
from tests.ops.problem import DEVICES, PLACES, SCALE, make_dy, make_inputs, run, seed_on, solve

places = pytest.mark.parametrize(("device", "dtype"), PLACES)


@places
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(77, 101, 75, 5), (64, 96, 128, 16), (1, 33, 65, 3), (129, 1, 1, 2)], ids=str)
def test_values_and_gradients(shape, bias, device, dtype):
    inputs = make_inputs(*shape, device, dtype, bias=bias)
    got = solve(inputs, make_dy(inputs))
    assert {value.dtype for value in got.values()} == {dtype}


@places
@pytest.mark.parametrize("r", [1, 5, 17, 512])
def test_ranks(r, device, dtype):
    inputs = make_inputs(53, 70, 45, r, device, dtype)
    solve(inputs, make_dy(inputs))


@places
@pytest.mark.parametrize("leading", [(), (3,), (2, 7), (2, 1, 3, 4)], ids=str)
def test_leading_dimensions(leading, device, dtype):
    inputs = make_inputs(leading, 21, 34, 4, device, dtype)
    got = solve(inputs, make_dy(inputs))
    assert got["y"].shape == (*leading, 34)
    assert got["dx"].shape == (*leading, 21)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_factors_of_another_dtype(dtype, lora_dtype, device):
    inputs = make_inputs(40, 72, 56, 6, device, dtype, lora_dtype)
    got = solve(inputs, make_dy(inputs))
    assert (got["y"].dtype, got["dx"].dtype) == (dtype, dtype)
    assert (got["dA"].dtype, got["dB"].dtype) == (lora_dtype, lora_dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_scale_as_a_tensor_is_the_float(device):
    inputs = make_inputs(19, 23, 29, 3, device)
    dy = make_dy(inputs)
    as_float = run(lora_linear, inputs, dy, scale=SCALE)
    as_tensor = run(lora_linear, inputs, dy, scale=torch.tensor(SCALE, device=device))
    doubled = run(lora_linear, inputs, dy, scale=2 * SCALE)
    for name, value in as_float.items():
        assert torch.equal(value, as_tensor[name])
    assert not torch.equal(as_float["y"], doubled["y"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_of_another_dtype(dtype, device):
    """A float32 bias on a 16-bit base, and the other way round, before and after the usual one."""
    inputs = make_inputs(50, 40, 30, 3, device, dtype)
    for bias_dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        bias = inputs["bias"].detach().to(bias_dtype).requires_grad_()
        got = solve(inputs | {"bias": bias}, make_dy(inputs))
        assert (got["y"].dtype, got["dbias"].dtype) == (dtype, bias_dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck(p, bias):
    inputs = make_inputs((2, 3), 5, 4, 2, dtype=torch.float64, bias=bias)
    weight = inputs.pop("weight")
    names = tuple(inputs)

    def function(*values):
        named = dict(zip(names, values, strict=True))
        return lora_linear(weight=weight, scale=SCALE, p=p, seed=seed_on("cpu"), **named)

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_float64():
    inputs = make_inputs(77, 101, 75, 5, dtype=torch.float64)
    inputs["bias"].requires_grad_(False)
    solve(inputs, make_dy(inputs))


def test_bias_gradient_has_the_precision_of_float64():
    inputs = make_inputs(301, 5, 4, 2, dtype=torch.float64)
    dy = make_dy(inputs)
    error = (run(lora_linear, inputs, dy)["dbias"] - dy.sum(0)).abs().max()
    assert error < 1e-12


def check_layouts(leading, x_layout, dy_layout, device, dtype):
    inputs = make_inputs(leading, 40, 32, 4, device, dtype)
    inputs["x"] = x_layout(inputs["x"].detach()).requires_grad_()
    dy = dy_layout(make_dy(inputs))
    got = solve(inputs, dy)
    assert got["y"].is_contiguous()
    twins = inputs | {"x": contiguous(inputs["x"].detach()).requires_grad_()}
    for name, value in run(lora_linear, twins, contiguous(dy), scale=SCALE).items():
        torch.testing.assert_close(got[name], value)


# Every pair of layouts is another set of kernels to compile on a GPU: there all pairs in one dtype, below each with
# itself in all.
@pytest.mark.parametrize(("device", "dtype"), PLACES[:3])
@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
def test_layouts(x_layout, dy_layout, device, dtype):
    check_layouts((24,), x_layout, dy_layout, device, dtype)


@places
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_three_dimensions(layout, device, dtype):
    check_layouts((2, 12), layout, layout, device, dtype)


@places
@pytest.mark.parametrize("layout", list(BIAS_LAYOUTS))
def test_layouts_of_the_bias(layout, device, dtype):
    """Through a number and a tensor as the scale, which take different ways to a kernel."""
    inputs = make_inputs(26, 40, 32, 4, device, dtype)
    inputs["bias"] = BIAS_LAYOUTS[layout](inputs["bias"].detach())
    dy = make_dy(inputs)
    by_number = solve(inputs, dy)
    by_tensor = run(lora_linear, inputs, dy, scale=torch.tensor(SCALE, device=device))
    for name, value in by_number.items():
        assert torch.equal(value, by_tensor[name]), name


@places
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["weight", "A", "B"])
def test_layouts_of_the_matrices(name, layout, device, dtype):
    inputs = make_inputs(26, 40, 32, 4, device, dtype)
    inputs[name] = layout(inputs[name].detach()).requires_grad_(name != "weight")
    solve(inputs, make_dy(inputs))


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_a_sum(device):
    inputs = make_inputs(20, 30, 40, 3, device)
    lora_linear(**inputs, scale=SCALE).sum().backward()
    want = run(lora_linear, inputs, torch.ones(20, 40, device=device), scale=SCALE)
    for name in ("x", "A", "B", "bias"):
        torch.testing.assert_close(inputs[name].grad, want[f"d{name}"])


EMPTY = [(0, 5, 7), ((2, 0, 3), 5, 7), (4, 0, 7), (4, 5, 0)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("M", "K", "N"), EMPTY, ids=str)
def test_empty(M, K, N, device):
    inputs = make_inputs(M, K, N, 3, device)
    got = run(lora_linear, inputs, make_dy(inputs), scale=SCALE)
    for name in ("x", "A", "B", "bias"):
        assert got[f"d{name}"].shape == inputs[name].shape
        assert torch.count_nonzero(got[f"d{name}"]) == 0 or name == "bias"
    assert got["y"].shape == (*inputs["x"].shape[:-1], N)
    if K == 0:
        assert torch.equal(got["y"], inputs["bias"].expand_as(got["y"]))


@pytest.mark.parametrize(("M", "K", "N"), [(0, 5, 7), (4, 0, 7), (4, 5, 0)], ids=str)
def test_empty_without_gradients(M, K, N):
    inputs = make_inputs(M, K, N, 3)
    with torch.no_grad():
        assert lora_linear(**inputs).shape == (M, N)
