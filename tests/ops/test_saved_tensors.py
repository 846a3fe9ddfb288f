"""What is saved for backward passes is all shown to who looks at saved tensors, and nothing is kept beside it."""

import pytest
import torch
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fused_lora.ops import Part, lora_group, lora_linear, lora_mlp
from fused_lora.reference import lora_linear_ref
from tests.ops.problem import DEVICES, randn

CALLS = {
    "linear": lambda x, parts: lora_linear(x, *parts[0][:5]),
    "linear with a gain": lambda x, parts: lora_linear(x, *parts[0][:5], gain=parts[0].weight.float().norm(dim=1)),
    "group": lambda x, parts: torch.cat(lora_group(x, parts), -1),
    "MLP": lambda x, parts: lora_mlp(x, *parts),
}


@pytest.fixture(params=[*CALLS])
def call(request):
    return CALLS[request.param]


def problem(device):
    """x and three square parts."""
    options = {"device": device, "dtype": torch.float32 if device == "cpu" else torch.bfloat16}
    parts = [
        Part(
            randn(64, 64, **options, std=0.125), randn(r, 64, **options, std=0.125).requires_grad_(),
            randn(64, r, **options).requires_grad_(), scale=torch.tensor(0.625, device=device),
        )
        for r in (3, 8, 16)
    ]  # fmt: skip
    return randn(5, 24, 64, **options).requires_grad_(), parts


def factors(parts):
    return [factor for part in parts for factor in (part.A, part.B)]


def change(parts):
    with torch.no_grad():
        for factor in factors(parts):
            factor.mul_(2)


def gradients(loss, x, parts):
    return torch.autograd.grad(loss, [x, *factors(parts)], allow_unused=True)


def assert_equal(got, want):
    for value, expected in zip(got, want, strict=True):
        assert (value is None) == (expected is None)
        assert value is None or torch.equal(value, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["torch's own", "copies"])
def test_a_change_after_the_forward_pass(way, call, device):
    """Hooks that keep what was saved give gradients of that."""
    x, parts = problem(device)
    want = gradients(call(x, parts).float().sin().sum(), x, parts)
    hooks = saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)
    with allow_mutation_on_saved_tensors() if way == "torch's own" else hooks:
        loss = call(x, parts).float().sin().sum()
        change(parts)
        got = gradients(loss, x, parts)
    assert_equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_a_change_before_a_checkpoints_second_pass(call, device):
    """It computes with what there is then, as of torch's own linears."""
    x, parts = problem(device)
    loss = checkpoint(call, x, parts, use_reentrant=False).float().sum()
    change(parts)
    got = gradients(loss, x, parts)
    assert_equal(got, gradients(call(x, parts).float().sum(), x, parts))


@pytest.mark.filterwarnings("default")  # torch reads .grad of tensors that are no leaves
def test_a_checkpoint_under_compiled_autograd():
    x, (part, *_) = problem("cpu")
    inputs = (x, *part[:3])

    def run(function):
        return checkpoint(function, *inputs, None, part.scale, use_reentrant=False).sin().sum()

    want = torch.autograd.grad(run(lora_linear_ref), [x, part.A, part.B])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        run(lora_linear).backward()
    for leaf, expected in zip((x, part.A, part.B), want, strict=True):
        torch.testing.assert_close(leaf.grad, expected)
