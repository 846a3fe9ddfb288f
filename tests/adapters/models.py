"""A model of odd sizes, by PEFT and by this package, and what both give."""

import copy

import peft
import torch
from torch import nn

from fused_lora import LoRALinear


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(9, 7), nn.Linear(7, 9, bias=False), nn.LayerNorm(9)

    def forward(self, x):
        return self.norm(x + self.down(torch.tanh(self.up(x))))


class Net(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.out = nn.Linear(9, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def randomised(model, seed=1):
    """Factors and trained biases as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def by_peft(model=None, **options):
    """A PeftModel with random factors."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]} | options
    return randomised(peft.get_peft_model(net() if model is None else model, peft.LoraConfig(**options)))


def x_of(dtype=torch.float32):
    return torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(3)).to(dtype)


@torch.no_grad()
def outputs(model, x=None):
    return copy.deepcopy(model).eval().double()(x_of().double() if x is None else x)


def adapted(model):
    """(r, scaling, lora_A, lora_B, bias) of each layer, of PEFT or of this package, by name."""
    found = {}
    for name, layer in model.named_modules():
        name = name.removeprefix("base_model.model.")
        if isinstance(layer, LoRALinear):
            found[name] = layer.r, layer.scaling, layer.lora_A, layer.lora_B, layer.bias
        elif isinstance(layer, peft.tuners.lora.Linear):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            found[name] = layer.r["default"], layer.scaling["default"], A, B, layer.base_layer.bias
    return found


def assert_same_layers(ours, theirs):
    ours, theirs = adapted(ours), adapted(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name][:2] == theirs[name][:2], name
        for mine, other in zip(ours[name][2:], theirs[name][2:], strict=True):
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other), name
