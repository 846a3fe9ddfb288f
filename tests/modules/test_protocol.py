"""Groups, MLPs, explain and ReLoRA take any layer that answers for its part, and weights that are no parameters."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fused_lora import LoRALinear, explain, replace_linear
from fused_lora.modules import LoRAMLP, siblings
from fused_lora.modules.fusing import fuse
from fused_lora.ops import Part, lora_group, lora_linear, lora_mlp
from fused_lora.relora import ReLoRA

MADE = "weight was made from a tensor that requires gradients"


class Foreign(nn.Module):
    """Somebody else's layer, with names of its own."""

    merged = False
    dropping = 0.0

    def __init__(self, linear, r=3, scale=0.7):
        super().__init__()
        self.base, self.scale = linear.requires_grad_(False), torch.tensor(scale)
        self.down = nn.Parameter(torch.randn(r, linear.in_features))
        self.up = nn.Parameter(torch.randn(linear.out_features, r))

    @property
    def frozen_weight(self):
        return self.base.weight

    @property
    def compute_dtype(self):
        return self.base.weight.dtype

    def lora_part(self):
        return Part(self.base.weight, self.down, self.up, self.base.bias, self.scale)

    lora_sources = lora_part

    def why_not(self):
        return None

    def offered(self, x):
        return self.lora_part()

    def forward(self, x):
        y = siblings.output(self, x)
        return y if y is not None else self.base(x) + self.scale * (x @ self.down.T @ self.up.T)


class Attention(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.q_proj, self.k_proj, self.part = make(nn.Linear(9, 5)), make(nn.Linear(9, 7)), nn.Linear(9, 2)

    def forward(self, x):
        return self.q_proj(x).sum() + self.k_proj(x).sum() * self.part(x).sum()


class MLP(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.gate, self.up, self.down = make(nn.Linear(9, 11)), make(nn.Linear(9, 11)), make(nn.Linear(11, 9))

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def grads_of(model, x):
    x = x.clone().requires_grad_()
    model(x).sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def both(make_model):
    """The same layers alone and fused."""
    models = []
    for fused in (False, True):
        torch.manual_seed(0)
        models.append(make_model())
        if fused:
            fuse(models[-1], [module for module in models[-1].modules() if isinstance(module, Foreign)])
    return models


def test_a_group_of_foreign_layers(groups):
    plain, fused = both(lambda: Attention(Foreign))
    x = torch.randn(4, 9)
    for want, got in zip(grads_of(plain, x), grads_of(fused, x), strict=True):
        torch.testing.assert_close(got, want)
    assert groups == [2]  # without the child that is called `part`


def test_an_mlp_of_foreign_layers(as_one):
    plain, fused = both(lambda: nn.Sequential(MLP(Foreign)))
    x = torch.randn(4, 9)
    assert isinstance(fused[0], LoRAMLP)
    for want, got in zip(grads_of(plain, x), grads_of(fused, x), strict=True):
        torch.testing.assert_close(got, want)
    assert len(as_one) == 1


def test_explain_of_a_foreign_layer():
    assert explain(Foreign(nn.Linear(9, 5))).shape == (8192, 9, 5, 3)
    assert list(explain(Attention(Foreign)).layers) == ["q_proj", "k_proj"]


def test_relora_of_foreign_layers():
    model = nn.Sequential(Foreign(nn.Linear(9, 7)), nn.ReLU(), Foreign(nn.Linear(7, 2)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    relora = ReLoRA(model, optimizer, reset_every=1)
    x = torch.randn(4, 9)
    model(x).square().mean().backward()
    optimizer.step()
    before, weight = model(x).detach(), model[0].base.weight.clone()
    relora.step()
    assert not model[0].up.any()
    assert not torch.equal(model[0].base.weight, weight)
    torch.testing.assert_close(model(x), before)
    assert [type(module) for module in relora.finish()] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(model(x), before)


# weights that were made from something that requires gradients


def part_of(N, K, r, seed):
    generator = torch.Generator().manual_seed(seed)
    W, A, B, bias = (torch.randn(*shape, generator=generator) for shape in ((N, K), (r, K), (N, r), (N,)))
    return [tensor.requires_grad_() for tensor in (W, A, B, bias)]


def by_hand(x, W, A, B, bias):
    return x @ W.T + 0.7 * (x @ A.T) @ B.T + bias


def made(W, A, B, bias):
    return Part(W.view_as(W), A, B, bias, 0.7)


def as_linear(x, gate, up, down):
    return lora_linear(x, *made(*gate)[:5])


def as_group(x, gate, up, down):
    y, z = lora_group(x, [made(*gate), made(*up)])
    return y.sin() * z


def as_mlp(x, gate, up, down):
    return lora_mlp(x, made(*gate), made(*up), made(*down))


WAYS = {
    as_linear: lambda x, gate, up, down: by_hand(x, *gate),
    as_group: lambda x, gate, up, down: by_hand(x, *gate).sin() * by_hand(x, *up),
    as_mlp: lambda x, gate, up, down: by_hand(nn.functional.silu(by_hand(x, *gate)) * by_hand(x, *up), *down),
}


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_of_what_a_weight_was_made_from(way):
    x = torch.randn(4, 9, requires_grad=True)
    parts = part_of(11, 9, 3, 0), part_of(11, 9, 2, 1), part_of(5, 11, 4, 2)
    inputs = [x, *(tensor for part in parts for tensor in part)]
    with pytest.warns(UserWarning, match=MADE):
        y = way(x, *parts)
    found = torch.autograd.grad(y.sum(), inputs, allow_unused=True)
    wanted = torch.autograd.grad(WAYS[way](x, *parts).sum(), inputs, allow_unused=True)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("model", [Attention, MLP])
def test_torch_funcs_grad_of_all_parameters(model):
    torch.manual_seed(0)
    net, x = nn.Sequential(model(lambda linear: linear)), torch.randn(4, 9)
    replace_linear(net, 3, 2.0, target_modules=r".*(_proj|gate|up|down)")
    parameters = dict(net.named_parameters())
    got = torch.func.grad(lambda values: functional_call(net, values, (x,)).sum())(parameters)
    names = [name for name in parameters if "lora_" not in name]
    plain = nn.Sequential(model(lambda linear: linear))
    own = {name: parameters[name].detach().requires_grad_() for name in names}  # with B = 0
    wanted = torch.autograd.grad(functional_call(plain, own, (x,)).sum(), own.values())
    for name, want in zip(names, wanted, strict=True):
        torch.testing.assert_close(got[name], want, msg=name)


def test_a_parameter_under_autocast_must_be_frozen_too():
    part = Part(*part_of(11, 9, 3, 0))
    with torch.autocast("cpu"), pytest.raises(ValueError, match="weight must be frozen"):
        lora_linear(torch.randn(4, 9), *part[:5])


@pytest.mark.parametrize("model", [Attention, MLP])
def test_a_functional_call_with_weights_that_train(model, groups, as_one):
    torch.manual_seed(0)
    net, x = nn.Sequential(model(lambda linear: linear)), torch.randn(4, 9)
    replace_linear(net, 3, 2.0, target_modules=r".*(_proj|gate|up|down)")
    for layer in net.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.lora_B)
    own = {name: tensor.detach().requires_grad_() for name, tensor in net.named_parameters()}
    with pytest.warns(UserWarning, match=MADE):
        y = functional_call(net, {name: tensor * 1 for name, tensor in own.items()}, (x,))
    got = dict(zip(own, torch.autograd.grad(y.sum(), own.values()), strict=True))
    dense = {}
    for name, layer in net.named_modules():
        if isinstance(layer, LoRALinear):
            update = layer.scaling * own[f"{name}.lora_B"] @ own[f"{name}.lora_A"]
            dense[f"{name}.weight"] = own[f"{name}.weight"] + update
    others = {name: tensor for name, tensor in own.items() if name not in dense and "lora_" not in name}
    plain = nn.Sequential(model(lambda linear: linear))
    y = functional_call(plain, {**others, **dense}, (x,))
    for (name, grad), want in zip(got.items(), torch.autograd.grad(y.sum(), own.values()), strict=True):
        torch.testing.assert_close(grad, want, msg=name)
    assert not groups
    assert not as_one


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("act", ["merge_", "unmerge_"])
def test_a_weight_that_is_made_at_each_use_is_not_merged(act):
    layer = LoRALinear(9, 5, 2, 3.0)
    nn.init.normal_(layer.lora_B)
    if act == "unmerge_":
        layer.merge_()
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    x = torch.randn(4, 9)
    before = layer(x)
    with pytest.raises(ValueError, match="weight must be a parameter to be merged"):
        getattr(layer, act)()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("late", [True, False])
def test_relora_wants_parameters(name, late):
    layer = LoRALinear(9, 5, 2, 3.0)
    model = nn.Sequential(layer)

    def parametrize():
        nn.utils.parametrize.register_parametrization(layer, name, Doubled())

    if not late:
        parametrize()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if not late:
        with pytest.raises(ValueError, match=f"0.{name} must be a parameter"):
            ReLoRA(model, optimizer, reset_every=2)
        return
    relora = ReLoRA(model, optimizer, reset_every=2)
    parametrize()
    with pytest.raises(ValueError, match=f"{name} must be a parameter|not held by the optimizer"):
        relora.finish()
    assert relora.cycle == 0
