"""Layers whose frozen weight is in a format, and what their tensors are bit by bit."""

import pytest
import torch
from torch import nn

from fused_lora import LoRALinear, replace_linear
from fused_lora.formats import FP8, INT8, NF4

FORMATS = [FP8("rows"), FP8("blocks"), FP8("tensor"), FP8("rows", powers=True), INT8(), NF4(), NF4(nested=True)]
every_format = pytest.mark.parametrize("form", FORMATS, ids=str)
BASE = ("weight", "weight_scale", "weight_outer")


def linear(K=65, N=33, dtype=torch.float32, bias=True):
    """Whose rows and columns are of different sizes, so that no scale is like another."""
    made = nn.Linear(K, N, bias=bias).to(dtype)
    with torch.no_grad():
        made.weight.mul_(torch.linspace(0.5, 4, N)[:, None]).mul_(torch.linspace(1, 3, K))
    return made


def trained(form, K=65, N=33, dtype=torch.float32, **options):
    """A layer whose update is not zero; lora_alpha / r is 5/3."""
    layer = LoRALinear.from_linear(linear(K, N, dtype), 3, 5.0, base=form, **options)
    nn.init.normal_(layer.lora_B)
    return layer


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second = linear(70, 65, dtype), linear(65, 33, dtype)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def net(form, seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    model = Net(dtype)
    for layer in replace_linear(model, 3, 5.0, base=form, **options).layers(model):
        nn.init.normal_(layer.lora_B)
    return model


def with_every_byte(model):
    """All 256 codes in every layer's weight, e4m3's NaNs among them."""
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            flat = bits(layer.weight).view(-1)
            flat.copy_(torch.arange(len(flat)) % 256)
    return model


def bits(tensor):
    """As integers, of which a NaN is equal to itself."""
    size = tensor.element_size()
    return tensor.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


def base_state(model):
    """(bits, dtype) of all that is of a format, by name."""
    state = model.state_dict()
    found = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] in BASE}
    return {name: (bits(tensor).clone().cpu(), tensor.dtype) for name, tensor in found.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, (own, dtype) in one.items():
        assert other[name][1] is dtype, name
        assert torch.equal(own, other[name][0]), name
