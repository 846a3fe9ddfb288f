"""What is found in a model beside plain linears, and entries that find nothing: all of it is said."""

import pytest
import torch
from torch import nn

from fused_lora import replace_linear

OPTIONS = dict(r=4, lora_alpha=6.0)


class Experts(nn.Module):
    """Whose weights are chosen by row."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 4, 8))
        self.down_proj = nn.Parameter(torch.randn(3, 8, 4))
        self.position = nn.Parameter(torch.randn(1, 7, 4))


class Conv1D(nn.Module):
    """A linear whose weight lies the other way, as GPT-2's."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.zeros(8))


def mixture():
    plain = {"embedding": nn.Embedding(9, 4), "conv": nn.Conv1d(4, 4, 3), "norm": nn.LayerNorm((3, 4))}
    return nn.ModuleDict({"experts": Experts(), "c_attn": Conv1D(), "proj": nn.Linear(4, 4), **plain})


def test_weights_of_no_linear_are_named():
    report = replace_linear(mixture(), **OPTIONS)
    assert report.replaced == ["proj"]
    assert report.skipped == {
        "experts": "no nn.Linear but Experts with gate_up_proj (3, 4, 8), down_proj (3, 8, 4)",
        "c_attn": "no nn.Linear but Conv1D with weight (4, 8)",
    }


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_module_without_shapes_yet():
    lazy = [nn.LazyBatchNorm1d(), nn.LazyConv1d(4, 3), nn.LazyLinear(4)]
    report = replace_linear(nn.Sequential(nn.Linear(4, 4), *lazy), **OPTIONS)
    assert report.skipped == {"3": "a subclass of nn.Linear (LazyLinear)"}
    assert report.parameters == 4 * 4 + 4 + 2 * 4 * 4


def test_they_are_named_where_they_are_targeted():
    assert replace_linear(mixture(), target_modules=["proj"], **OPTIONS).skipped == {}
    report = replace_linear(mixture(), target_modules=["proj", "c_attn"], **OPTIONS)
    assert list(report.skipped) == ["c_attn"]
    assert report.unmatched == []
    with pytest.raises(ValueError, match=r"matches no nn\.Linear .*\n.*c_attn: no nn\.Linear but Conv1D"):
        replace_linear(mixture(), target_modules=["c_attn"], **OPTIONS)


def test_an_entry_that_matches_nothing_is_said():
    with pytest.warns(UserWarning, match="target_modules entry 'q_proj' matches no linear layer"):
        report = replace_linear(mixture(), target_modules=["proj", "q_proj"], **OPTIONS)
    assert report.unmatched == ["target_modules entry 'q_proj'"]
    assert "  ? target_modules entry 'q_proj' matches no linear layer" in str(report).splitlines()
    for excluded in (["nowhere"], "nowhere.*"):
        with pytest.warns(UserWarning, match="exclude_modules entry 'nowhere") as warned:
            replace_linear(mixture(), exclude_modules=excluded, **OPTIONS)
        assert warned[0].filename == __file__


def test_layers_replaced_before_are_named():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("first", "second")})
    replace_linear(model, target_modules=["first"], **OPTIONS)
    before = model["first"]
    report = replace_linear(model, **OPTIONS)
    assert report.replaced == ["second"]
    assert report.skipped == {"first": "a LoRALinear already"}
    assert model["first"] is before


def test_a_model_of_peft_is_refused():
    peft = pytest.importorskip("peft")
    inner = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)})
    model = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    for whole in (model, model.base_model, inner):
        with pytest.raises(ValueError, match=r"^model has adapters of PEFT already \(.*q_proj\): .*merge_and_unload"):
            replace_linear(whole, **OPTIONS)
    assert before == {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    assert replace_linear(model.merge_and_unload(), **OPTIONS).replaced == ["q_proj", "o_proj"]
