"""LoRABank over a weight in a format: each row's adapter beside what the codes stand for."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn

from fused_lora import AdapterCache, AdapterTree, LoRABank, add_adapter, explain, route
from fused_lora.formats import NF4, dequantise
from tests.modules.bases import assert_same, base_state, every_format, linear

ROWS = [5, 3, 4]


def model_of(form, dtype=torch.float32):
    model = nn.Sequential(linear(70, 65, dtype), nn.Tanh(), linear(65, 33, dtype))
    add_adapter(model, "one", r=3, lora_alpha=5.0, base=form)
    add_adapter(model, "two", r=20, lora_alpha=8.0)
    for name, factor in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(factor, std=0.3)
    return model


def dense(model, x):
    """By plain products: of rows of `one`, of `two` and of none."""
    for layer in model:
        if not isinstance(layer, LoRABank):
            x = layer(x)
            continue
        W, parts = dequantise(layer.frozen_weight), []
        for name, rows in zip(("one", "two", None), x.split(ROWS), strict=True):
            V = (
                W
                if name is None
                else W + layer.adapters[name].scaling * layer.factors(name)[1] @ layer.factors(name)[0]
            )
            parts.append(rows @ V.T + layer.bias)
        x = torch.cat(parts)
    return x


@every_format
def test_rows_of_several_adapters(form):
    model, x = model_of(form), torch.randn(sum(ROWS), 70)
    assert {layer.base for layer in (model[0], model[2])} == {form}
    factors = [factor for layer in (model[0], model[2]) for name in ("one", "two") for factor in layer.factors(name)]
    with route(model, ["one", "two", "__base__"], ROWS):
        got = model(x)
        grads = torch.autograd.grad(got.square().sum(), factors)
    wanted = dense(model, x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for one, other in zip(grads, torch.autograd.grad(wanted.square().sum(), factors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


@every_format
def test_moves_and_copies(form):
    model, x = model_of(form), torch.randn(sum(ROWS), 70)
    before = base_state(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).half().float()):
        assert_same(before, base_state(twin))
        with route(twin, ["one", "two", "__base__"], ROWS):
            torch.testing.assert_close(twin(x), dense(twin, x), rtol=1e-4, atol=1e-4)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    assert_same(before, base_state(twin))
    assert {twin[0].compute_dtype, twin[0].lora_dtype} == {torch.bfloat16}
    other = model_of(form)
    other.load_state_dict(model.state_dict())
    assert_same(before, base_state(other))


@pytest.mark.parametrize("theirs", [None, "int8"])
def test_another_format_is_refused(theirs):
    target, source = model_of("nf4"), model_of(theirs)
    before = base_state(target)
    with pytest.raises(RuntimeError, match=r"0: the checkpoint has weight .*, the layer of base nf4 weight"):
        target.load_state_dict(source.state_dict(), strict=False)
    assert_same(before, base_state(target))


def test_the_weights_are_let_go_of():
    model = nn.Sequential(linear(), linear(33, 20))
    weights = [weakref.ref(layer.weight) for layer in model]
    report = add_adapter(model, "one", r=3, lora_alpha=5.0, base="fp8")
    assert [each() for each in weights] == [None, None]
    assert report.base == "fp8 by rows"
    made = LoRABank.from_linear(linear(), base="int8")
    assert "base=int8" in repr(made)
    assert explain(model[0], tokens=8).base == "fp8 by rows"
    assert "the frozen weight in fp8 by rows" in str(explain(model, tokens=8))


def test_errors_come_before_any_change():
    model = nn.Sequential(linear(), linear(33, 20))
    with torch.no_grad():
        model[1].weight[0, 0] = torch.inf
    for act in (
        lambda: add_adapter(model, "one", r=3, lora_alpha=5.0, base="nf4"),
        lambda: AdapterCache(model, 1, 4, 2, base="nf4"),
    ):
        with pytest.raises(ValueError, match=r"1: linear\.weight must be finite to be quantised"):
            act()
    assert [type(each) for each in model] == [nn.Linear] * 2
    with pytest.raises(ValueError, match="base must be one of"):
        add_adapter(model, "one", r=3, lora_alpha=5.0, base="nf3")


@every_format
def test_a_cache(form):
    model = nn.Sequential(linear())
    cache = AdapterCache(model, slots=2, r=4, host=3, base=form)
    A, B = torch.randn(4, 65), torch.randn(33, 4)
    cache.put("a", {"0": (A, B)}, lora_alpha=6.0)
    x = torch.randn(3, 65)
    with torch.no_grad(), cache.route(["a", "__base__"], [2, 1]):
        y = model(x)
    W = dequantise(model[0].frozen_weight)
    wanted = x @ W.T + model[0].bias
    wanted[:2] += 1.5 * x[:2] @ A.T @ B.T
    torch.testing.assert_close(y, wanted.detach())
    with pytest.raises(ValueError, match="shape"):
        cache.put("b", {"0": (torch.randn(4, 64), B)}, lora_alpha=6.0)


def test_a_tree_does_not_merge_into_codes():
    tree = AdapterTree(nn.Sequential(linear()))
    tree.add("root", None, r=3, lora_alpha=5.0, base=NF4())
    before = base_state(tree.model)
    with pytest.raises(NotImplementedError, match=r"0\.weight is quantised"):
        tree.merge_into_base("root")
    assert_same(before, base_state(tree.model))
    assert "root" in str(tree)
