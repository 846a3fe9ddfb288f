"""Gated MLPs computed as one: the same numbers as their three layers, and only where that is what a module does."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_lora import replace_linear
from fused_lora.modules import LoRALinear, LoRAMLP
from fused_lora.modules.lora_mlp import recognise


class GatedMLP(nn.Module):
    """One as models write them, under names of its own."""

    def __init__(self, act=None, bias=True):
        super().__init__()
        self.w1, self.w3 = nn.Linear(16, 24, bias), nn.Linear(16, 24, bias)
        self.w2 = nn.Linear(24, 16, bias)
        self.act = act or nn.SiLU()
        self.hidden_size = 16

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Holder(nn.Module):
    """A model around an MLP."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return x + self.mlp(x)


def make_pair(mlp=None, **options):
    """The same model twice: three layers, and one MLP."""
    torch.manual_seed(0)
    alone = Holder(mlp or GatedMLP())
    fused = copy.deepcopy(alone)
    options = {"r": 4, "lora_alpha": 8} | options
    replace_linear(alone, **options, fuse="off")
    report = replace_linear(fused, **options)
    for layer in (alone.mlp.w1, alone.mlp.w2, alone.mlp.w3):
        nn.init.normal_(layer.lora_B, std=0.1)
    fused.load_state_dict(alone.state_dict())
    assert report.mlps == ["mlp"]
    assert report.groups == []
    assert isinstance(fused.mlp, LoRAMLP)
    return alone, fused


def gradients(model, x):
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("save", ["all", "less"])
@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(approximate="tanh")], ids=["silu", "gelu"])
def test_an_mlp_gives_what_its_layers_give(act, save):
    alone, fused = make_pair(GatedMLP(act))
    fused.mlp.save = save
    x = torch.randn(5, 3, 16)
    theirs, ours = gradients(alone, x), gradients(fused, x)
    assert torch.allclose(fused(x), alone(x), atol=1e-5)
    assert theirs.keys() == ours.keys()
    for name, grad in theirs.items():
        assert (grad is None) == (ours[name] is None)
        assert grad is None or torch.allclose(ours[name], grad, rtol=1e-4, atol=1e-4), name


def test_the_mlp_it_replaces_is_kept_but_for_its_forward():
    _, fused = make_pair()
    assert fused.mlp.hidden_size == 16
    assert isinstance(fused.mlp.act, nn.SiLU)
    assert fused.mlp.layers == (fused.mlp.w1, fused.mlp.w3, fused.mlp.w2)
    assert "activation=silu, save=all" in str(fused)


def test_merged_layers_and_hooks_are_called_one_by_one():
    alone, fused = make_pair()
    x = torch.randn(3, 16)
    wanted = alone(x)
    fused.mlp.w1.merge_()
    assert torch.allclose(fused(x), wanted, atol=1e-5)
    fused.mlp.w1.unmerge_()
    seen = []
    handle = fused.mlp.w3.register_forward_hook(lambda module, args, y: seen.append(y))
    assert torch.allclose(fused(x), wanted, atol=1e-5)
    assert len(seen) == 1
    handle.remove()
    assert torch.allclose(fused(x), wanted, atol=1e-5)
    assert len(seen) == 1


def test_children_can_be_replaced():
    alone, fused = make_pair()
    x = torch.randn(3, 16)
    for name in ("w1", "w3", "w2"):
        setattr(fused.mlp, name, getattr(fused.mlp, name).to_linear())
        assert torch.allclose(fused(x), alone(x), atol=1e-5)


def test_evaluation_drops_nothing():
    alone, fused = make_pair(lora_dropout=0.5)
    x = torch.randn(3, 16)
    assert not torch.allclose(fused(x), alone.eval()(x))
    assert torch.allclose(fused.eval()(x), alone(x), atol=1e-5)


def test_copies_and_pickles():
    alone, fused = make_pair()
    x = torch.randn(3, 16)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(x), fused(x))
        assert twin.state_dict().keys() == alone.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled_in_one_graph():
    alone, fused = make_pair()
    x = torch.randn(3, 16)
    assert torch.allclose(torch.compile(fused, fullgraph=True, backend="eager")(x), alone(x), atol=1e-5)


class Swapped(GatedMLP):
    def forward(self, x):
        return self.w2(self.w3(x) * F.silu(self.w1(x)))


class Scaled(GatedMLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x) * 2)


class Branching(GatedMLP):
    def forward(self, x):
        if x.sum() > 0:
            x = -x
        return super().forward(x)


class Ungated(GatedMLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) + self.w3(x))


class Squared(GatedMLP):
    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w1(x))


def test_a_forward_is_recognised_by_what_it_does():
    assert recognise(GatedMLP()) == (("w1", "w3", "w2"), "silu")
    assert recognise(Swapped()) == (("w1", "w3", "w2"), "silu")
    assert recognise(GatedMLP(nn.GELU("tanh"))) == (("w1", "w3", "w2"), "gelu_tanh")


@pytest.mark.parametrize(
    "mlp",
    [Scaled(), Branching(), Ungated(), Squared(), GatedMLP(nn.GELU()), GatedMLP(nn.ReLU()), GatedMLP(nn.PReLU())],
    ids=lambda mlp: f"{type(mlp).__name__}-{mlp.act}",
)
def test_anything_else_is_left_as_it_is(mlp):
    model = Holder(mlp)
    x = torch.randn(3, 16)
    wanted = model(x)
    report = replace_linear(model, r=2)
    assert report.mlps == []
    assert model.mlp is mlp
    assert torch.allclose(model(x), wanted, atol=1e-6)


def test_hooks_and_partial_replacements_keep_their_module():
    hooked = Holder(GatedMLP())
    hooked.mlp.register_forward_hook(lambda module, args, y: y)
    assert replace_linear(hooked, r=2).mlps == []
    partial = Holder(GatedMLP())
    assert replace_linear(partial, r=2, target_modules=["w1", "w3"]).mlps == []


def test_errors_name_what_does_not_fit():
    def mlp(**sizes):
        module = GatedMLP()
        for name, (cols, rows) in {"w1": (16, 24), "w3": (16, 24), "w2": (24, 16), **sizes}.items():
            setattr(module, name, LoRALinear(cols, rows, r=2))
        return module

    for sizes, words in (
        ({"w3": (16, 20)}, "gate and up must have the same out_features, got 24 and 20"),
        ({"w2": (20, 16)}, "down must have in_features 24, got 20"),
        ({"w3": (8, 24)}, "layers of a group must have one in_features"),
    ):
        with pytest.raises(ValueError, match=words):
            LoRAMLP(mlp(**sizes), ("w1", "w3", "w2"), "silu")
    with pytest.raises(ValueError, match="gate, up and down must be LoRALinear"):
        LoRAMLP(GatedMLP(), ("w1", "w3", "w2"), "silu")
