"""A checkpoint's second pass stops before results that nobody needs, and gives the same gradients."""

import importlib

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fused_lora import replace_linear
from fused_lora.ops import library, recomputed
from tests.ops.problem import DEVICES


@pytest.fixture(autouse=True)
def _all_are_worth_it(monkeypatch):
    monkeypatch.setattr(recomputed, "LEAST_FLOPS", 0)


class Block(nn.Module):
    """As a decoder's: its last product is of the layer that is called last."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(24, 24), Block()

    def forward(self, x):
        return x + self.block(torch.tanh(self.first(x)))


def model_of(device, p, fuse):
    torch.manual_seed(0)
    model = Model().to(device)
    for layer in replace_linear(model, 3, 4.5, lora_dropout=p, fuse=fuse).layers(model):
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def gradients(model, x, run):
    torch.manual_seed(1)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad(run(model, x).sin().sum(), [x, *trained])


@pytest.fixture
def widths(monkeypatch):
    """Of the first part of each forward pass."""
    seen, real = [], library.ops.lora_parts_forward

    class Ops:
        def __getattr__(self, name):
            return getattr(library.ops, name)

        def lora_parts_forward(self, x, parts, *rest):
            seen.append(len(parts[0]))
            return real(x, parts, *rest)

    for name in ("autograd", "lora_mlp", "recomputed"):
        monkeypatch.setattr(importlib.import_module(f"fused_lora.ops.{name}"), "ops", Ops())
    return seen


def checkpointed(model, x):
    return checkpoint(model, x, use_reentrant=False)


def to_the_end(model, x):
    with set_checkpoint_early_stop(False):
        return checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("fuse", ["auto", "off"])
@pytest.mark.parametrize("run", [checkpointed, to_the_end])
def test_the_same_gradients(run, fuse, p, device, request):
    if device == "cpu" and fuse == "auto":
        request.getfixturevalue("as_one")
    model = model_of(device, p, fuse)
    x = torch.randn(5, 7, 24, device=device, requires_grad=True)
    want = gradients(model, x, lambda model, x: model(x))
    for got, plain in zip(gradients(model, x, run), want, strict=True):
        torch.testing.assert_close(got, plain)


@pytest.mark.parametrize(("fuse", "second"), [("auto", [8, 24, 40, 8]), ("off", [8, 24, 8, 40, 8, 40, 8])])
def test_the_last_product_is_not_made_again(fuse, second, widths, as_one):
    """What is made twice over on the way is narrow."""
    model = model_of("cpu", 0.0, fuse)
    x = torch.randn(5, 24, requires_grad=True)
    y = checkpointed(model, x)
    del widths[:]
    y.sum().backward()
    assert widths == second


def test_a_result_that_is_changed_in_place():
    model = model_of("cpu", 0.0, "off")
    x = torch.randn(5, 24, requires_grad=True)

    def run(layer, x):
        y = layer(x)
        y += 1
        return y.tanh()

    want = gradients(model.first, x, run)
    got = gradients(model.first, x, lambda layer, x: checkpoint(run, layer, x, use_reentrant=False))
    for each, plain in zip(got, want, strict=True):
        torch.testing.assert_close(each, plain)


def test_a_small_product_is_made_again(widths, as_one, monkeypatch):
    """It costs less than to avoid it."""
    monkeypatch.setattr(recomputed, "LEAST_FLOPS", 2 * 5 * 40 * 24 + 1)
    x = torch.randn(5, 24, requires_grad=True)
    y = checkpointed(model_of("cpu", 0.0, "auto"), x)
    del widths[:]
    y.sum().backward()
    assert widths == [24, 40, 24]


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("fuse", ["auto", "off"])
def test_the_same_gradients_by_the_cuda_kernels(fuse, p):
    """The first pass saves in C++, and the second one, in Python, the same tensors in the same order."""
    model = model_of("cuda", p, fuse).bfloat16()
    x = torch.randn(300, 24, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    want = gradients(model, x, lambda model, x: model(x))
    for run in (checkpointed, to_the_end):
        for got, plain in zip(gradients(model, x, run), want, strict=True):
            assert (got.float() - plain.float()).norm() < 5e-3 * plain.float().norm()
