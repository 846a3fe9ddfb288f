"""What hooks for saved tensors see, and that what they do not see is watched all the same."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_lora import backends
from fused_lora.ops import Part, lora_group, lora_linear, lora_mlp
from tests.ops.problem import randn

PLACES = [
    pytest.param(("cpu", "auto"), id="cpu"),
    *(pytest.param(("cuda", name), id=name, marks=pytest.mark.gpu) for name in ("auto", "triton", "addmm")),
]
CALLS = {
    "linear": lambda x, parts: lora_linear(x, *parts[0][:5]),
    "linear with a gain": lambda x, parts: lora_linear(x, *parts[0][:5], gain=parts[0].weight.float().norm(dim=1)),
    "group": lambda x, parts: torch.cat(lora_group(x, parts), -1),
    "MLP": lambda x, parts: lora_mlp(x, *parts),
}


@pytest.fixture(params=PLACES)
def device(request):
    device, backend = request.param
    with backends.forcing(backend):
        yield device


@pytest.fixture(params=[*CALLS])
def call(request):
    return CALLS[request.param]


def problem(device, trained=("A", "B")):
    """x and three square parts."""
    options = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    parts = []
    for r in (3, 8, 16):
        part = Part(
            randn(64, 64, **options, std=0.125), randn(r, 64, **options, std=0.125), randn(64, r, **options),
            scale=torch.tensor(0.625, device=device),
        )  # fmt: skip
        for name in trained:
            getattr(part, name).requires_grad_()
        parts.append(part)
    return randn(5, 24, 64, **options).requires_grad_(), parts


def gradients(call, x, parts):
    wanted = [x, *(tensor for part in parts for tensor in (part.A, part.B) if tensor.requires_grad)]
    grads = torch.autograd.grad(call(x, parts).float().sin().sum(), wanted, allow_unused=True)
    return [grad for grad in grads if grad is not None]


def seen_by_hooks(call, x, parts):
    seen = set()

    def pack(tensor):
        seen.add(tensor.data_ptr())
        return tensor.detach().clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return gradients(call, x, parts), seen


def test_trained_factors_and_scales_are_not_seen(call, device):
    x, parts = problem(device)
    want = gradients(call, x, parts)
    got, seen = seen_by_hooks(call, x, parts)
    assert {x.data_ptr(), parts[0].weight.data_ptr()} <= seen
    assert not seen & {tensor.data_ptr() for part in parts for tensor in (part.A, part.B, part.scale)}
    for value, expected in zip(got, want, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("trained", ["A", "B"])
def test_frozen_factors_are_seen(trained, call, device):
    """Nobody holds them but who saves them."""
    x, parts = problem(device, trained=[trained])
    want = gradients(call, x, parts)
    got, seen = seen_by_hooks(call, x, parts)
    frozen = parts[0].B if trained == "A" else parts[0].A
    assert frozen.data_ptr() in seen
    assert getattr(parts[0], trained).data_ptr() not in seen
    for value, expected in zip(got, want, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", ["A", "B", "scale"])
def test_a_change_in_place_is_found(name, call, device):
    x, parts = problem(device)
    y = checkpoint(call, x, parts, use_reentrant=False)
    with torch.no_grad():
        getattr(parts[0], name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.float().sum().backward()


def test_second_derivatives(call, device):
    x, parts = problem(device)

    def penalty(call):
        (dx,) = torch.autograd.grad(call(x, parts).float().sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.float().square().sum(), [x, parts[0].A, parts[0].B])

    want = penalty(call)
    got = penalty(lambda x, parts: checkpoint(call, x, parts, use_reentrant=False))
    for value, expected in zip(got, want, strict=True):
        assert torch.equal(value, expected)
