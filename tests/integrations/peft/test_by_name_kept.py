"""Samples that name their adapters where PEFT's own forward computes them: the same bits and errors, and a word."""

import peft
import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

from fused_lora import choices, explain
from fused_lora.integrations.peft import accelerate

from .models import assert_same, config_of, net, randomised, twin_of
from .naming import BATCHES, both, check, with_others, x_of

pytestmark = pytest.mark.filterwarnings("default")


def test_pefts_errors(routed):
    plain, model = both()
    for each in (plain, model):
        with pytest.raises(ValueError, match="non-existing adapter"):
            each(x_of(1), adapter_names=["nobody"])
        with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
            each(x_of(2), adapter_names=["default"])
        each.train()
        with pytest.raises(ValueError, match="in training mode"):
            each(x_of(1), adapter_names=["default"])
        each.eval().merge_adapter()
        with pytest.raises(ValueError, match="merged adapters"):
            each(x_of(1), adapter_names=["default"])
    assert not routed


def add_bias(model):
    model.add_adapter("other", config_of(lora_bias=True))


def add_wide(model):
    model.add_adapter("other", config_of(r=257))


def add_variant(model):
    model.add_adapter("other", config_of(velora_config=peft.VeloraConfig()))


def hook(model):
    model.add_adapter("other", config_of())
    model.base_model.model.up.lora_B["other"].register_forward_hook(lambda *_: None)


OBSTACLES = {
    add_bias: "adapter other has a bias of its factors",
    add_wide: "adapter other has 257 ranks, more than 256",
    add_variant: "adapter other is no plain LoRA but VeloraLinearVariant",
    hook: "a module of its adapter other cannot be passed over: it has hooks",
}


@pytest.mark.parametrize(("change", "reason"), OBSTACLES.items(), ids=OBSTACLES.values())
def test_an_adapter_that_is_left_to_peft(change, reason, routed):
    """By itself: batches without it are computed as before."""
    plain, model = both()
    for each in (plain, model):
        torch.manual_seed(1)
        change(each)
        randomised(each.double(), seed=4).eval()
    report = accelerate(model)
    up = "base_model.model.up"
    assert report.kept_by_name[up] == reason
    assert up in report.served
    which = "all of them" if len(report.kept_by_name) == 2 else up
    assert f"  - {which}, where samples name their adapters: {reason}" in str(report)
    assert f"where samples name their adapters, its own forward computes it: {reason}" in str(explain(model))
    layer, names = model.base_model.model.up, ["default", "other"]
    own = plain.base_model.model.up
    assert torch.equal(layer(x_of(2), adapter_names=names), own(x_of(2), adapter_names=names))
    assert not routed
    layer(x_of(2), adapter_names=["default", "second"])
    assert len(routed) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have the kernels")
def test_without_a_kernel_it_is_pefts():
    plain, model = both()
    check(plain, model, BATCHES["in order"], 0)
    reason = accelerate(model).kept_by_name["base_model.model.up"]
    assert reason == choices.choose_segments(torch.device("cpu"), torch.float64, 128, True, False).reason
    assert reason in str(explain(model))


def test_nothing_is_said_where_all_is_served(routed):
    _, model = both()
    assert not accelerate(model).kept_by_name
    assert "name their adapters" not in str(accelerate(model)) + str(explain(model))


def test_dora_is_pefts_error():
    model = with_others(net(use_dora=True))
    report = accelerate(model)
    assert "adapter default is DoRA" in report.kept_by_name["base_model.model.down"]
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        model(x_of(1), adapter_names=["default"])


def test_layers_in_training_drop_as_pefts(routed):
    layer = net(lora_dropout=0.5).base_model.model.up
    own = layer.forward
    torch.manual_seed(7)
    wanted = own(x_of(1), adapter_names=["default"])
    accelerate(torch.nn.Sequential(layer))
    torch.manual_seed(7)
    assert torch.equal(layer(x_of(1), adapter_names=["default"]), wanted)
    assert not routed
    layer.eval()(x_of(1), adapter_names=["default"])
    assert len(routed) == 1


def test_scales_that_are_tensors(routed):
    plain, model = both()
    for each in (plain, model):
        prepare_model_for_compiled_hotswap(each, target_rank=80)
    check(plain, model, ["default", "second"], 0)
    assert not routed


def test_adapters_that_are_disabled(routed):
    plain, model = both()
    x = x_of(1)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(x, adapter_names=["default"]), plain(x, adapter_names=["default"]))
    assert not routed


@pytest.mark.parametrize("shape", [(9,), (9, 9), (0, 9), (2, 0, 9), (2, 3, 1, 9)])
def test_shapes(shape, routed):
    plain, model = both()
    up, own = model.base_model.model.up, plain.base_model.model.up
    x = torch.randn(shape, dtype=torch.float64)
    names = [["default", "second", "__base__"][i % 3] for i in range(shape[0])]
    if len(shape) > 1:
        torch.testing.assert_close(up(x, adapter_names=names), own(x, adapter_names=names), rtol=1e-12, atol=1e-12)
        return
    with pytest.raises(RuntimeError):
        own(x, adapter_names=names)
    with pytest.raises(RuntimeError):
        up(x, adapter_names=names)


def test_modules_to_save(routed):
    plain = net(target_modules=["up"], modules_to_save=["down"])
    plain.add_adapter("second", config_of(target_modules=["up"], modules_to_save=["down"]))
    randomised(plain.double(), seed=4).eval()
    with torch.no_grad():
        plain.base_model.model.down.modules_to_save["second"].weight.mul_(3)
    model = twin_of(plain)
    accelerate(model)
    check(plain, model, ["second", "default", "second"])
    assert len(routed) == 1


def test_compiled_calls_are_pefts(routed):
    plain, model = both()
    torch._dynamo.reset()
    layer = torch.compile(model.base_model.model.up, backend="eager")
    names = ["default", "second"]
    torch.testing.assert_close(
        layer(x_of(2), adapter_names=names), plain.base_model.model.up(x_of(2), adapter_names=names)
    )
    assert not routed


def test_derivatives_of_torch_func_are_pefts(routed):
    plain, model = both()
    x, names = x_of(2), ["default", "second"]
    parameters = {name: each.detach() for name, each in plain.named_parameters() if "lora_" in name}

    def gradients(of):
        loss = lambda tensors: torch.func.functional_call(of, tensors, (x,), {"adapter_names": names}).sum()  # noqa: E731
        return torch.func.grad(loss)(parameters)

    assert_same(gradients(model), gradients(plain), 1e-12)
    assert not routed
