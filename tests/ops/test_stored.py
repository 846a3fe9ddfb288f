"""A frozen weight in a format, where ops take one: as the weight that its codes stand for, rounded to x's dtype."""

import pytest
import torch

from fused_lora import backends
from fused_lora.formats import FP8, INT8, NF4, Stored, dequantise
from fused_lora.ops import Part, lora_group, lora_linear, lora_mlp, row_norms
from fused_lora.ops.parts import flatten, unflatten
from fused_lora.reference import lora_linear_ref, lora_mlp_ref
from tests.accuracy import assert_accurate
from tests.ops.problem import PLACES, SCALE, cast, make_dy, make_inputs, randn, run, seed_on, unfused

FORMATS = [FP8("rows"), FP8("blocks"), FP8("tensor"), FP8("rows", powers=True), INT8(), NF4(), NF4(nested=True)]
SHAPES = [(33, 65, 97, 3), ((3, 50), 192, 576, 16), (300, 1000, 264, 40)]  # M, K, N, r
every_format = pytest.mark.parametrize("form", FORMATS, ids=str)
everywhere = pytest.mark.parametrize(("device", "dtype"), PLACES)


def quantised(inputs, form, dtype):
    """(the inputs with a weight in a format, those with the weight that it stands for)."""
    stored = form.quantise(inputs["weight"])
    plain = inputs | {"weight": dequantise(stored, dtype)}
    return inputs | {"weight": stored}, plain


def differentiated(function, inputs, dy, **options):
    y = function(**inputs, **options)
    wanted = [name for name, tensor in inputs.items() if tensor.requires_grad]
    grads = torch.autograd.grad(y, [inputs[name] for name in wanted], dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def check(got, plain, dy, **options):
    exact = run(lora_linear_ref, cast(plain, torch.float64), dy.double(), **options)
    by_torch = run(unfused, plain, dy, **options)
    for name, value in got.items():
        assert_accurate(name, value, exact[name], by_torch[name], roundings=4)


@every_format
def test_flat_lists(form):
    W = torch.randn(9, 70)
    part = Part(form.quantise(W), torch.randn(2, 70), torch.randn(9, 2))
    (again,) = unflatten(flatten([part]))
    assert isinstance(again.weight, Stored)
    assert torch.equal(dequantise(again.weight), dequantise(part.weight))
    assert (again.weight.shape, again.weight.numel()) == ((9, 70), 630)


@everywhere
@every_format
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora_linear(p, shape, form, device, dtype):
    M, K, N, r = shape
    inputs, plain = quantised(make_inputs(M, K, N, r, device, dtype), form, dtype)
    dy = make_dy(plain)
    options = {"scale": SCALE, "p": p, "seed": seed_on(device) if p else None}
    check(differentiated(lora_linear, inputs, dy, **options), plain, dy, **options)


@everywhere
@every_format
def test_a_gain(form, device, dtype):
    inputs, plain = quantised(make_inputs(60, 130, 97, 5, device, dtype), form, dtype)
    gain = (torch.rand(97) + 0.5).to(device)
    dy, options = make_dy(plain), {"scale": SCALE, "gain": gain}
    check(differentiated(lora_linear, inputs, dy, **options), plain, dy, **options)


@everywhere
@every_format
def test_groups_and_mlps(form, device, dtype):
    """Of parts in formats, and of a plain one beside them."""
    x = randn(70, 65, device=device, dtype=dtype).requires_grad_()
    sizes = {"gate": (65, 96), "up": (65, 96), "down": (96, 40)}
    stored, plain = {}, {}
    for i, (name, (K, N)) in enumerate(sizes.items()):
        own = make_inputs(1, K, N, 3 + i, device, dtype)
        own.pop("x")
        stored[name], plain[name] = quantised(own, form, dtype) if name != "up" else (own, own)
    parts = {name: Part(**of, scale=SCALE) for name, of in stored.items()}
    ys = lora_group(x, [parts["gate"], parts["up"]])
    for y, name in zip(ys, ("gate", "up"), strict=True):
        inputs = {"x": x} | plain[name]
        exact = lora_linear_ref(**cast(inputs, torch.float64), scale=SCALE)
        assert_accurate(name, y.detach(), exact.detach(), unfused(**inputs, scale=SCALE).detach())
    y = lora_mlp(x, *parts.values())
    act = torch.nn.functional.silu
    of = lambda dtype: [{k: v.to(dtype) for k, v in each.items()} | {"scale": SCALE} for each in plain.values()]  # noqa: E731
    exact = lora_mlp_ref(x.double(), *of(torch.float64), act)
    by_torch = lora_mlp_ref(x, *of(dtype), act)
    wanted = [x, *(parts[name].A for name in sizes), *(parts[name].B for name in sizes)]
    dy = randn(*y.shape, device=device, dtype=dtype)
    got = torch.autograd.grad(y, wanted, dy)
    exact_grads, torch_grads = (
        torch.autograd.grad(exact, wanted, dy.double()),
        torch.autograd.grad(by_torch, wanted, dy),
    )
    assert_accurate("y", y.detach(), exact.detach(), by_torch.detach())
    for i, grads in enumerate(zip(got, exact_grads, torch_grads, strict=True)):
        assert_accurate(f"gradient {i}", *grads, roundings=4)


@every_format
def test_norms_of_rows(form):
    stored, A, B = form.quantise(torch.randn(65, 130)), torch.randn(3, 130), torch.randn(65, 3)
    scale = torch.tensor(SCALE)
    found = row_norms(stored, A, B, scale)
    expected = (dequantise(stored, torch.float64) + SCALE * B.double() @ A.double()).norm(dim=1)
    assert (found - expected).abs().max() < 1e-5 * expected.max()


@every_format
def test_without_a_gradient_of_the_weight(form):
    """Second derivatives too."""
    inputs, plain = quantised(make_inputs(20, 65, 33, 3), form, torch.float32)
    found = []
    for of in (inputs, plain):
        y = lora_linear(**of, scale=SCALE)
        (dx,) = torch.autograd.grad((y * y).sum(), of["x"], create_graph=True)
        found.append(torch.autograd.grad((dx * dx).sum(), of["A"])[0])
    assert (found[0] - found[1]).abs().max() < 1e-4 * found[1].abs().max()


def test_what_x_must_be():
    inputs, _ = quantised(make_inputs(20, 65, 33, 3), INT8(), torch.float32)
    with pytest.raises(TypeError, match="x must be float16, bfloat16 or float32 beside a quantised weight"):
        lora_linear(**inputs | {"x": inputs["x"].double()})
    with pytest.raises(ValueError, match=r"A must have shape \(r, 65\)"):
        lora_linear(**inputs | {"A": torch.randn(3, 64)})


@pytest.mark.parametrize("name", ["reference", "addmm"])
@every_format
def test_backends_of_torch(form, name):
    inputs, plain = quantised(make_inputs(50, 129, 70, 4), form, torch.float32)
    dy = make_dy(plain)
    with backends.forcing(name):
        check(differentiated(lora_linear, inputs, dy, scale=SCALE), plain, dy, scale=SCALE)


@every_format
def test_under_autocast(form):
    inputs, _ = quantised(make_inputs(20, 65, 33, 3), form, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**inputs)
    assert y.dtype is torch.bfloat16


@everywhere
@every_format
def test_zeros_give_zeros(form, device, dtype):
    """Rows of x and of dy, rows and blocks of W: nothing is divided by nothing."""
    inputs = make_inputs(40, 192, 130, 5, device, dtype, bias=False)
    with torch.no_grad():
        inputs["x"][3] = 0
        inputs["weight"][7], inputs["weight"][:, 64:128] = 0, 0
        inputs["B"].zero_()
    inputs, _ = quantised(inputs, form, dtype)
    y = lora_linear(**inputs, scale=SCALE)
    dy = torch.randn_like(y).index_fill_(0, torch.tensor([5], device=device), 0)
    dx, dA = torch.autograd.grad(y, [inputs["x"], inputs["A"]], dy)
    assert all(tensor.isfinite().all() for tensor in (y, dx, dA))
    for zeros in (y[3], y[:, 7], dx[5], dx[:, 64:128]):
        assert (zeros == 0).all()
