"""merge_and_unload: a plain model with the same outputs, which other libraries save and load; nothing half."""

import copy

import pytest
import torch
from torch import nn

from fused_lora import (
    LoRALinear,
    load_adapter,
    merge_and_unload,
    print_trainable_parameters,
    replace_linear,
    save_adapter,
)  # fmt: skip
from fused_lora.modules import LoRAMLP
from fused_lora.modules.mixins import Mixin

from .test_transformers import LINEARS, make

pytestmark = pytest.mark.filterwarnings("default")  # the libraries warn of their own affairs


def converted(model, **options):
    torch.manual_seed(1)
    report = replace_linear(model, 3, 5.0, **options)
    for layer in report.layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return report


def tokens_of(model):
    return torch.randint(1, 96, (2, 9), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model):
    return model.eval()(tokens_of(model)).logits


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma2"])
def test_a_hugging_face_model_is_saved_merged(name, tmp_path):
    model = make(name)
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    report = converted(model, target_modules=LINEARS)
    assert report.mlps
    assert report.groups
    want = logits(model)
    plain = merge_and_unload(model)
    assert plain is model
    assert [type(module) for module in plain.modules()] == classes
    assert list(plain.state_dict()) == keys
    torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path)), logits(plain))


def test_a_hugging_face_model_is_saved_as_base_and_adapter(tmp_path):
    model = make("Llama")
    model.save_pretrained(tmp_path / "base")
    converted(model, target_modules=LINEARS, freeze=True)
    save_adapter(model, tmp_path / "adapter")
    again = type(model).from_pretrained(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_save_pretrained_alone_loses_the_update(tmp_path):
    """Why the two ways above are told: where this changes, so may the words."""
    model = make("Llama")
    converted(model, target_modules=LINEARS)
    model.save_pretrained(tmp_path)
    assert not torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("train_bias", [True, False])
def test_against_float64(bias, train_bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 7, bias=bias), nn.Tanh(), nn.Linear(7, 5, bias=bias)).double()
    report = converted(model, train_bias=train_bias)
    want = [
        layer.weight.detach() + 5 / 3 * layer.lora_B.detach() @ layer.lora_A.detach() for layer in report.layers(model)
    ]
    biases = [layer.bias for layer in report.layers(model)]
    report.layers(model)[0].merge_()  # by hand, before
    merge_and_unload(model)
    for linear, weight, own in zip((model[0], model[2]), want, biases, strict=True):
        assert type(linear) is nn.Linear
        assert linear.weight.is_contiguous()
        assert all(parameter.requires_grad for parameter in linear.parameters())
        torch.testing.assert_close(linear.weight, weight, rtol=1e-14, atol=1e-14)
        assert (linear.bias is None) == (own is None)
        assert own is None or torch.equal(linear.bias, own)


def test_rows_that_were_padded_are_dense():
    layer = LoRALinear(13, 7, 3, 5.0, dtype=torch.bfloat16)
    layer.weight.data = torch.empty(7, 64, dtype=torch.bfloat16)[:, :13].copy_(layer.weight)
    assert not layer.weight.is_contiguous()
    assert merge_and_unload(nn.Sequential(layer))[0].weight.is_contiguous()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_factors_that_are_not_finite_change_nothing(factor, value):
    model = make("Llama")
    report = converted(model, target_modules=LINEARS)
    with torch.no_grad():
        getattr(report.layers(model)[-1], factor)[0, 0] = value
    before = copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"{report.replaced[-1]}: {factor} must be finite"):
        merge_and_unload(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, before[name]) or "lora" in name for name, value in model.state_dict().items())
    assert any(isinstance(module, LoRAMLP) for module in model.modules())


def test_no_layers():
    with pytest.raises(ValueError, match="model has no LoRALinear layers"):
        merge_and_unload(nn.Linear(3, 4))


def test_a_layer_that_is_the_model():
    layer = LoRALinear(9, 5, 3, 5.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 9)
    want = layer(x)
    plain = merge_and_unload(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), want)


def test_a_layer_with_two_names():
    linear = nn.Linear(9, 9)
    model = nn.ModuleDict({"one": linear, "two": nn.ModuleDict({"three": linear})})
    replace_linear(model, 3, 5.0)
    merge_and_unload(model)
    assert type(model["one"]) is nn.Linear
    assert model["two"]["three"] is model["one"]


def test_converted_again():
    model = make("Llama")
    converted(model, target_modules=LINEARS)
    assert converted(merge_and_unload(model), target_modules=LINEARS).mlps
    assert sum(isinstance(module, Mixin) for module in model.modules()) == 4


def test_the_line_of_trained_parameters(capsys):
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(make("Llama"), peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEARS))
    theirs.print_trainable_parameters()
    model = make("Llama")
    converted(model, target_modules=LINEARS, freeze=True)
    print_trainable_parameters(model)
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert second.startswith("trainable params: ")
    print_trainable_parameters(nn.Identity())
    assert capsys.readouterr().out == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"
