"""Inputs of a LoRA linear, and its results three ways: the op's, torch's unfused formula's, and float64's."""

import pytest
import torch

from fused_lora import lora_linear
from fused_lora.reference import lora_linear_ref
from tests.accuracy import assert_accurate

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# (device, dtype): what a CPU computes in float16 it computes as in bfloat16.
PLACES = [
    *(pytest.param("cpu", dtype, id=f"cpu-{dtype}") for dtype in (torch.float32, torch.bfloat16)),
    *(
        pytest.param("cuda", dtype, id=f"cuda-{dtype}", marks=pytest.mark.gpu)
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
    ),
]
SCALE = 0.625  # exact in float32, which is what a scale is
SEED = 0x1234_5678_9ABC  # wider than 32 bits


def seed_on(device, value=SEED):
    return torch.tensor(value, dtype=torch.int64, device=device)


def randn(*shape, device, dtype, std=1.0):
    return (torch.randn(*shape) * std).to(device, dtype)


def make_inputs(M, K, N, r, device="cpu", dtype=torch.float32, lora_dtype=None, bias=True):
    """lora_linear's tensors by name, all but weight requiring gradients; M is a number of tokens or leading sizes."""
    leading = (M,) if isinstance(M, int) else M
    lora_dtype = lora_dtype or dtype
    inputs = {
        "x": randn(*leading, K, device=device, dtype=dtype),
        "weight": randn(N, K, device=device, dtype=dtype, std=max(K, 1) ** -0.5),
        "A": randn(r, K, device=device, dtype=lora_dtype, std=max(K, 1) ** -0.5),
        "B": randn(N, r, device=device, dtype=lora_dtype, std=r**-0.5),
    }
    if bias:
        inputs["bias"] = randn(N, device=device, dtype=dtype)
    return {name: tensor.requires_grad_(name != "weight") for name, tensor in inputs.items()}


def make_dy(inputs):
    x, weight = inputs["x"], inputs["weight"]
    return randn(*x.shape[:-1], weight.shape[0], device=x.device, dtype=x.dtype)


def run(function, inputs, dy, **options):
    """y and the gradient of every input that requires one, by name."""
    y = function(**inputs, **options)
    wanted = [name for name, tensor in inputs.items() if tensor.requires_grad]
    grads = torch.autograd.grad(y, [inputs[name] for name in wanted], dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def cast(inputs, dtype):
    """Copies of the inputs in one dtype."""
    return {name: t.detach().to(dtype).requires_grad_(t.requires_grad) for name, t in inputs.items()}


def unfused(x, weight, A, B, bias=None, **options):
    """The formula in torch, in x's dtype; gradients come in the dtypes of the inputs."""
    bias = bias if bias is None else bias.to(x.dtype)
    return lora_linear_ref(x, weight, A.to(x.dtype), B.to(x.dtype), bias, **options)


def check(got, inputs, dy, scale=SCALE, **options):
    """The op's results against float64, held to the unfused formula in x's dtype."""
    exact = run(lora_linear_ref, cast(inputs, torch.float64), dy.double(), scale=scale, **options)
    by_torch = run(unfused, inputs, dy, scale=scale, **options)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_accurate(name, value, exact[name], by_torch[name])


def solve(inputs, dy, scale=SCALE, **options):
    """The op's results, checked."""
    got = run(lora_linear, inputs, dy, scale=scale, **options)
    check(got, inputs, dy, scale, **options)
    return got
