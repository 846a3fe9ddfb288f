"""What autograd may rely on: nothing saved or given is written to, and only the gradients asked for are computed."""

import importlib
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_lora import lora_linear
from fused_lora.ops import autograd, eager
from tests.ops.problem import DEVICES, PLACES, SCALE, check, make_dy, make_inputs, run, seed_on

op_module = importlib.import_module("fused_lora.ops.lora_linear")  # the package's attribute is the function
TRAINED = ("x", "A", "B")


def bits(t):
    return t.detach().contiguous().view(torch.uint8).clone()


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_inputs_and_dy_keep_their_bits(p, device, dtype):
    inputs = make_inputs(45, 37, 29, 3, device, dtype)
    dy = make_dy(inputs)
    before = {name: bits(t) for name, t in (inputs | {"dy": dy}).items()}
    y = lora_linear(**inputs, scale=SCALE, p=p, seed=seed_on(device))
    y_before = bits(y)
    first = torch.autograd.grad(y, [inputs[name] for name in TRAINED], dy, retain_graph=True)
    second = torch.autograd.grad(y, [inputs[name] for name in TRAINED], dy)
    for once, twice in zip(first, second, strict=True):
        assert torch.equal(bits(once), bits(twice))
    assert torch.equal(bits(y), y_before)
    for name, t in (inputs | {"dy": dy}).items():
        assert torch.equal(bits(t), before[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_two_consumers_of_y(device):
    inputs = make_inputs(45, 37, 29, 3, device)
    y = lora_linear(**inputs, scale=SCALE)
    (y.square().sum() + (3 * y).sum()).backward()
    got = {"y": y.detach()} | {f"d{name}": inputs[name].grad for name in (*TRAINED, "bias")}
    check(got, inputs, 2 * y.detach() + 3)


@pytest.mark.parametrize("device", DEVICES)
def test_one_x_for_three_layers(device):
    """As q, k and v: the gradients of x add up."""
    layers = [make_inputs(45, 37, n, 3, device) for n in (29, 8, 40)]
    x = layers[0]["x"]
    total = sum(lora_linear(**layer | {"x": x}, scale=SCALE).sum() for layer in layers)
    (dx,) = torch.autograd.grad(total, x)
    parts = [run(lora_linear, layer | {"x": x}, torch.ones(45, n, device=device), scale=SCALE)["dx"]
             for layer, n in zip(layers, (29, 8, 40), strict=True)]  # fmt: skip
    torch.testing.assert_close(dx, sum(parts))


def spy_on_backward(monkeypatch):
    """A list of the flags (need_dx, need_dA, need_dB) and results of every call of the backward op."""
    calls = []
    real = autograd.ops.lora_parts_backward

    class Spy:
        def __getattr__(self, name):
            return getattr(torch.ops.fused_lora, name)

        def lora_parts_backward(self, *args):
            need_dx, (need_dA, need_dB, _) = args[6:8]
            calls.append(((need_dx, need_dA, need_dB), real(*args)))
            return calls[-1][1]

    monkeypatch.setattr(autograd, "ops", Spy())
    monkeypatch.setattr(eager.backends, "eager_extension", lambda: None)  # which would not ask the op
    return calls


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_only_the_gradients_needed(needs, device, dtype, monkeypatch):
    inputs = make_inputs(33, 21, 50, 3, device, dtype)
    dy = make_dy(inputs)
    want = run(lora_linear, inputs, dy, scale=SCALE)
    calls = spy_on_backward(monkeypatch)
    for name, needed in zip(TRAINED, needs, strict=True):
        inputs[name] = inputs[name].detach().requires_grad_(needed)
    lora_linear(**inputs, scale=SCALE).backward(dy)
    torch.testing.assert_close(inputs["bias"].grad, want["dbias"])
    ((flags, results),) = calls
    assert flags == needs
    for name, needed, result in zip(TRAINED, needs, results[:3], strict=True):
        assert result.numel() == (inputs[name].numel() if needed else 0)
        assert (inputs[name].grad is not None) == needed
        if needed:
            torch.testing.assert_close(inputs[name].grad, want[f"d{name}"])


def test_a_frozen_bias_gets_no_gradient():
    inputs = make_inputs(6, 5, 4, 2)
    inputs["bias"].requires_grad_(False)
    lora_linear(**inputs, scale=SCALE).sum().backward()
    assert inputs["bias"].grad is None
    assert inputs["A"].grad is not None


@pytest.mark.parametrize("device", DEVICES)
def test_without_grad(device, monkeypatch):
    inputs = make_inputs(33, 21, 50, 3, device)
    want = lora_linear(**inputs, scale=SCALE)
    # The Function would give the same, at twice the price of a call.
    monkeypatch.setattr(autograd.LoRAPartsFunction, "apply", None)
    frozen = {name: t.detach() for name, t in inputs.items()}
    with torch.no_grad():
        no_grad = lora_linear(**inputs, scale=SCALE)
        trainable = lora_linear(**inputs | {"weight": inputs["weight"].clone().requires_grad_()}, scale=SCALE)
    with torch.inference_mode():
        inference = lora_linear(**inputs, scale=SCALE)
    for y in (no_grad, trainable, inference, lora_linear(**frozen, scale=SCALE)):
        assert y.grad_fn is None
        assert not y.requires_grad
        assert torch.equal(y, want.detach())


@pytest.mark.parametrize("device", DEVICES)
def test_changing_what_backward_saved_raises(device):
    inputs = make_inputs(6, 5, 4, 2, device)
    y = lora_linear(**inputs, scale=SCALE)
    inputs["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checkpointing_changes_nothing(p, device):
    inputs = make_inputs(33, 21, 50, 3, device)

    def block(x):
        return torch.relu(lora_linear(**inputs | {"x": x}, scale=SCALE, p=p))

    def gradients(function):
        torch.manual_seed(5)
        y = function(inputs["x"])
        return y, *torch.autograd.grad(y.square().sum(), [inputs[name] for name in TRAINED])

    plain = gradients(block)
    recomputed = gradients(lambda x: checkpoint(block, x, use_reentrant=False))
    for want, got in zip(plain, recomputed, strict=True):
        assert torch.equal(want, got)


def test_selective_checkpointing_sees_the_op():
    """By name, so that a policy can save y instead of computing it anew."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    inputs = make_inputs(33, 21, 50, 3)
    seen = []

    def policy(context, op, *args, **kwargs):
        seen.append((op, context.is_recompute))
        ours = op is torch.ops.fused_lora.lora_parts_forward.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def block(x):
        return torch.relu(lora_linear(**inputs | {"x": x}, scale=SCALE))

    def gradients(y):
        return torch.autograd.grad(y.sum(), [inputs[name] for name in TRAINED])

    y = checkpoint(
        block, inputs["x"], use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    for want, got in zip(gradients(block(inputs["x"])), gradients(y), strict=True):
        assert torch.equal(want, got)
    assert (torch.ops.fused_lora.lora_parts_forward.default, False) in seen
