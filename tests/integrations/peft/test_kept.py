"""What is left to PEFT's own forward: the same bits, and a word that says why."""

import peft
import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import Linear
from torch import nn

from fused_lora import explain
from fused_lora.integrations.peft import accelerate, restore

from .models import LLAMA, assert_same, config_of, language_model, net, randomised, results

pytestmark = pytest.mark.filterwarnings("default")


class OtherLinear(nn.Linear):
    """As a quantised one would be."""


class Packed(nn.Module):
    """As a base that was quantised has its weight, under names of its own."""

    def forward(self, x):
        return x[..., :1].expand(*x.shape[:-1], 13)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def x_of():
    return torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def hook(module):
    module.register_forward_hook(lambda *_: None)


def own_forward(module):
    module.forward = type(module).forward.__get__(module)


def base_of(model):
    return model.base_model.model.up.base_layer


def part_of(model, which):
    return getattr(model.base_model.model.up, which)["default"]


def disable(model):
    model.base_model.disable_adapter_layers()


def merge(model):
    model.merge_adapter()


def add_dora(model):
    """With dropout PEFT applies the base to the dropped input as well."""
    model.add_adapter("dora", config_of(use_dora=True, lora_dropout=0.5))
    randomised(model.double()).set_adapter("dora")


def add_dora_beside(model):
    model.add_adapter("dora", config_of(use_dora=True))
    randomised(model.double()).base_model.set_adapter(["default", "dora"])


def add_another_variant(model):
    config = config_of(velora_config=peft.VeloraConfig())
    model.add_adapter("velora", config)
    randomised(model.double()).set_adapter("velora")


def activate_two_that_drop(model):
    model.add_adapter("second", config_of(lora_dropout=0.5))
    randomised(model.double()).base_model.set_adapter(["default", "second"])


def train_base(model):
    model.base_model.model.up.base_layer.weight.requires_grad_(True)


def not_cast(model):
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.cast_input_dtype_enabled = False


def many_ranks(model):
    model.add_adapter("wide", config_of(r=510))
    randomised(model.double()).base_model.set_adapter(["default", "wide"])


def wide_rank(model):
    model.add_adapter("wide", config_of(r=513))
    randomised(model.double()).set_adapter("wide")


def pack_base(model):
    model.base_model.model.up.base_layer = Packed()


def exchange_factor(model):
    up = model.base_model.model.up
    old = up.lora_B["default"]
    up.lora_B["default"] = Doubled(old.in_features, old.out_features, bias=False, dtype=torch.float64)


CHANGES = {
    disable: "its adapters are disabled",
    merge: "merged: default",
    add_dora: "adapter dora is DoRA, and PEFT drops what its base reads too",
    add_dora_beside: "adapter dora is DoRA, and others are active beside it",
    add_another_variant: "adapter velora is no plain LoRA but VeloraLinearVariant",
    activate_two_that_drop: "each drops by a mask of its own",
    train_base: "its base cannot be passed over: its weight requires gradients",
    not_cast: "not to cast its input",
    many_ranks: "513 ranks, more than 512",
    wide_rank: "its active adapters have 513 ranks",
    pack_base: "its base cannot be passed over: it is a Packed",
    exchange_factor: "its adapter default cannot be passed over: it is a Doubled",
    lambda model: hook(base_of(model)): "its base cannot be passed over: it has hooks",
    lambda model: own_forward(base_of(model)): "its base cannot be passed over: it has a forward of its own",
    lambda model: hook(part_of(model, "lora_A")): "its adapter default cannot be passed over: it has hooks",
    lambda model: own_forward(part_of(model, "lora_B")): "default cannot be passed over: it has a forward of its own",
    lambda model: hook(part_of(model, "lora_dropout")): "its adapter default cannot be passed over: it has hooks",
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.items(), ids=CHANGES.values())
def test_each_call_decides(change, reason, alone):
    """What is changed after accelerate counts as what was before; and explain says so."""
    model = net()
    accelerate(model)
    change(model)
    layer = model.base_model.model.up
    assert reason in layer.why_not()
    assert reason in str(explain(model))
    torch.manual_seed(0)
    got = results(layer, x_of())
    assert not alone
    restore(model)
    torch.manual_seed(0)
    assert_same(got, results(layer, x_of()), 0)
    report = accelerate(model)
    assert reason.replace("cannot be passed over: it is a Packed", "is a ") in report.kept["base_model.model.up"]


def test_and_back(alone):
    """What is undone is computed by the kernels again."""
    model = net()
    wanted = results(model, x_of())
    accelerate(model)
    with model.disable_adapter():
        model(x_of())
    model.merge_adapter()
    model(x_of())
    assert not alone
    model.unmerge_adapter()
    assert_same(results(model, x_of()), wanted, 1e-12)
    assert len(alone) == 2


def test_the_input_is_not_cast_for_a_while(alone):
    model = net()
    accelerate(model)
    with disable_input_dtype_casting(model):
        model(x_of())
    assert not alone
    model(x_of())
    assert len(alone) == 2


def test_a_class_that_gets_another_forward(alone, monkeypatch):
    """As other libraries replace those of a whole class."""
    model = net()
    accelerate(model)
    real = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x, *args, **kwargs: real(self, x, *args, **kwargs) + 1)
    assert "another forward" in model.base_model.model.up.why_not()
    got = model.base_model.model.up(x_of())
    assert torch.equal(got, restore(model).base_model.model.up(x_of()))
    assert not alone
    with pytest.raises(ValueError, match="PEFT's own forward was replaced"):
        accelerate(model)


class OtherTensor(torch.Tensor):
    """As a sharded one would be."""


def nested():
    x = x_of()[0]
    return torch.nested.nested_tensor([x[:3], x[:2]], layout=torch.jagged)


def of_another_class():
    return x_of().as_subclass(OtherTensor)


@pytest.mark.parametrize("x", [nested, of_another_class])
def test_an_input_that_is_no_plain_tensor(x, alone):
    """It knows linears of its own, and no ops of this package."""
    model = net()
    wanted = model(x())
    accelerate(model)
    got = model(x())
    assert type(got) is type(wanted)
    assert all(map(torch.equal, got.unbind(), wanted.unbind()))
    assert not alone


def test_a_layer_that_has_a_forward_of_its_own(alone):
    """Of which nobody knows whether it calls its class's."""
    model = net()
    layer = model.base_model.model.up
    own = layer.forward
    layer.forward = lambda x: own(x) + 1
    wanted = results(model, x_of())
    report = accelerate(model)
    assert report.kept == {"base_model.model.up": "it has a forward of its own"}
    assert_same(results(model, x_of()), wanted, 1e-12)
    assert len(alone) == 1


def test_a_hook_on_the_layer_itself_runs(alone):
    model = net()
    accelerate(model)
    seen = []
    model.base_model.model.up.register_forward_hook(lambda *_: seen.append(1))
    model(x_of())
    assert len(seen) == 1
    assert len(alone) == 2


def test_weights_that_are_elsewhere_between_calls():
    """As DeepSpeed's, which its hooks gather."""
    model = language_model(LLAMA)
    for module in model.modules():
        hook(module)
    for name, parameter in model.named_parameters():
        if "base_layer" in name or "lora_" in name:
            parameter.data = parameter.data.new_empty(0)
    report = accelerate(model)
    assert not report.served
    assert len(report.kept) == 14
    assert "it has hooks" in str(explain(model))


def test_other_layers_of_pefts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.conv = nn.Embedding(5, 9), nn.Conv1d(9, 9, 1)
            self.linear, self.other = nn.Linear(9, 9), OtherLinear(9, 9)

    model = peft.get_peft_model(Net(), config_of(target_modules=["embedding", "conv", "linear", "other"]))
    report = accelerate(model)
    assert report.served == ["base_model.model.linear"]
    name = "base_model.model."
    assert report.kept[name + "embedding"] == "it is a peft.tuners.lora.layer.Embedding"
    assert report.kept[name + "conv"] == "it is a peft.tuners.lora.layer.Conv1d"
    assert "OtherLinear" in report.kept[name + "other"]


@pytest.mark.parametrize("what", ["no adapters", "no linear of LoRA", "another method"])
def test_nothing_to_do_is_refused(what):
    model = nn.Sequential(nn.Embedding(5, 9), nn.Linear(9, 9))
    if what == "no linear of LoRA":
        model = peft.get_peft_model(model, config_of(target_modules=["0"]))
    if what == "another method":
        model = peft.get_peft_model(model, peft.IA3Config(target_modules=["1"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="no LoRA linear of PEFT that the kernels could compute"):
        accelerate(model)


def test_a_bad_word_for_fuse():
    with pytest.raises(ValueError, match="fuse must be one of auto, off, got 'on'"):
        accelerate(net(), fuse="on")


def test_nothing_is_said_to_be_together_that_is_pefts():
    model = language_model(LLAMA, use_dora=True, lora_dropout=0.1).train()
    report = accelerate(model)
    assert (report.served, report.groups, report.mlps) == ([], [], [])
    model.eval()
    assert len(accelerate(model).groups) == 2
