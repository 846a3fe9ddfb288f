"""What the kernels compute of PEFT's LoRA linears: PEFT's own values and gradients, for every kind of configuration."""

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from torch import nn

from fused_lora import reference
from fused_lora.integrations.peft import accelerate, restore
from fused_lora.integrations.peft.linear import AcceleratedLinear

from .models import (
    ALPHA,
    GPT2,
    LLAMA,
    QWEN3,
    R,
    assert_same,
    config_of,
    language_model,
    net,
    randomised,
    results,
    twin_of,
)

pytestmark = pytest.mark.filterwarnings("default")  # the libraries warn of their own affairs
# By dtype of base and factors: what two orders of rounding may be apart.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
CONFIGURATIONS = {
    "plain": {},
    "rank and alpha patterns": {"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 7}},
    "rank-stabilised": {"use_rslora": True},
    "all biases": {"bias": "all"},
    "the layers' biases": {"bias": "lora_only"},
    "biases of factors": {"lora_bias": True, "target_modules": ["up"]},
    "some layers": {"target_modules": ["down"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "DoRA": {"use_dora": True},
    "DoRA, rank-stabilised": {"use_dora": True, "use_rslora": True, "bias": "all"},
}
if hasattr(peft.tuners.lora.LoraLayer, "orthogonal_init"):  # not in PEFT 0.15
    CONFIGURATIONS["orthogonal"] = {"init_lora_weights": "orthogonal", "r": 2}


def x_of(dtype=torch.float64):
    return torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(3)).to(dtype)


def check(model, alone, x=None, served=2, tolerance=1e-12):
    """Accelerated, it gives what it gave, by this package."""
    x = x_of() if x is None else x
    wanted = results(model, x)
    assert len(accelerate(model).served) == served
    assert_same(results(model, x), wanted, tolerance)
    assert len(alone) == served


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration(options, alone):
    model = net(torch.float32, **options).double()  # some beginnings are not made in float64
    check(model, alone, served=len(options.get("target_modules", "12")))


def test_dora_with_dropout_in_evaluation(alone):
    check(net(use_dora=True, lora_dropout=0.5).eval(), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_in_dtypes(dtype, alone):
    check(net(dtype, torch.float32, use_dora=True), alone, x_of(dtype), tolerance=TOLERANCE[dtype])


def test_dora_of_a_base_stored_the_other_way(alone):
    model = language_model(GPT2, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True)
    ids = torch.randint(0, 32, (2, 5))
    wanted = results(model, ids)
    assert len(accelerate(model).served) == 2
    assert_same(results(model, ids), wanted, 1e-10)
    assert len(alone) == 2


def test_dora_in_groups_and_mlps(groups, as_one):
    model = language_model(LLAMA, use_dora=True)
    ids = torch.randint(0, 32, (2, 5))
    wanted = results(model, ids)
    accelerate(model)
    assert_same(results(model, ids), wanted, 1e-10)
    assert (groups, len(as_one)) == ([3, 3], 2)


@pytest.mark.parametrize("adapters", [torch.float32, None], ids=["float32 factors", "factors of the base's dtype"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes(dtype, adapters, alone):
    tolerance = max(TOLERANCE[dtype], TOLERANCE[adapters or dtype])
    check(net(dtype, adapters), alone, x_of(dtype), tolerance=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype, alone):
    model = net(dtype, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = results(model, x_of(torch.float32))
        accelerate(model)
        got = results(model, x_of(torch.float32))
    assert len(alone) == 2
    assert_same(got, wanted, TOLERANCE[torch.bfloat16])


def test_a_base_stored_the_other_way(alone):
    model = language_model(GPT2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    ids = torch.randint(0, 32, (2, 5))
    wanted = results(model, ids)
    assert len(accelerate(model).served) == 4
    assert_same(results(model, ids), wanted, 1e-10)
    assert len(alone) == 4


def add_second(model, **options):
    model.add_adapter("second", config_of(r=2, lora_alpha=5, **options))
    return randomised(model.double(), seed=4)


def test_several_active_adapters(alone):
    model = add_second(net())
    model.base_model.set_adapter(["default", "second"])
    check(model, alone)


def test_several_active_adapters_with_biases(alone):
    model = add_second(net(lora_bias=True, target_modules=["up"]), lora_bias=True, target_modules=["up"])
    model.base_model.set_adapter(["default", "second"])
    check(model, alone, served=1)


def test_an_adapter_that_is_not_everywhere(alone):
    """Where it is not, the layer is its base."""
    model = add_second(net(), target_modules=["up"])
    model.set_adapter("second")
    wanted = results(model, x_of())
    report = accelerate(model)
    assert report.served == ["base_model.model.up"]
    assert report.kept == {"base_model.model.down": "none of its adapters is active"}
    assert_same(results(model, x_of()), wanted, 1e-12)
    assert len(alone) == 1


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_frozen_factor(factor, alone):
    model = net()
    for name, parameter in model.named_parameters():
        if factor in name:
            parameter.requires_grad_(False)
    check(model, alone)


def test_a_scale_that_changes(alone):
    model = net()
    plain = twin_of(model)
    accelerate(model)
    for change in (lambda layer: layer.set_scale("default", 2.5), lambda layer: layer.scale_layer(0.3)):
        for each in (model, plain):
            for layer in (each.base_model.model.up, each.base_model.model.down):
                change(layer)
        assert_same(results(model, x_of()), results(plain, x_of()), 1e-12)
    assert len(alone) == 4


def test_hotswapped_adapters(alone):
    """PEFT pads the factors (0.15 exchanges them), and r still says what it was."""
    model, other = net(), net(rank_pattern={"up": 2}, lora_alpha=7)
    other = peft.get_peft_model_state_dict(randomised(other, seed=5))
    prepare_model_for_compiled_hotswap(model, target_rank=6, config=model.peft_config["default"])
    accelerate(model)
    hotswap_adapter_from_state_dict(
        model, {name.replace(".weight", ".default.weight"): value for name, value in other.items()}, "default",
        config_of(rank_pattern={"up": 2}, lora_alpha=7),
    )  # fmt: skip
    assert len(model.base_model.model.up.lora_A.default.weight) in (2, 6)
    assert model.base_model.model.up.r["default"] == R
    got = results(model, x_of())
    assert len(alone) == 2
    assert_same(got, results(restore(model), x_of()), 1e-6)  # the scale is a float32 there


def test_dropout_is_this_packages(alone):
    model = net(lora_dropout=0.5).train()
    layer = model.base_model.model.up
    accelerate(model)
    x = x_of()
    torch.manual_seed(7)
    got = layer(x)
    torch.manual_seed(7)
    seed = torch.randint(2**62, (), dtype=torch.int64)
    A, B, base = layer.lora_A.default.weight, layer.lora_B.default.weight, layer.base_layer
    wanted = reference.lora_linear_ref(x, base.weight, A, B, base.bias, ALPHA / R, 0.5, seed)
    torch.testing.assert_close(got, wanted)
    assert not torch.equal(layer(x), got)
    assert len(alone) == 2


def test_dropout_of_all_and_in_evaluation(alone):
    model = net(lora_dropout=1.0)
    plain = twin_of(model)
    accelerate(model)
    for training in (False, True):
        wanted, got = (results(each.train(training), x_of()) for each in (plain, model))
        assert_same(got, wanted, 1e-12)
    assert len(alone) == 4


@pytest.mark.parametrize("batch", [(), (0,), (3, 1)])
def test_odd_batches(batch, alone):
    model = net()
    x = torch.randn(*batch, 9, dtype=torch.float64)
    wanted = results(model, x)
    accelerate(model)
    assert_same(results(model, x), wanted, 1e-12) if x.numel() else results(model, x)
    assert len(alone) == 2


# groups and MLPs


@pytest.mark.parametrize("second", [False, True], ids=["one adapter", "two active"])
def test_groups_and_mlps(second, groups, as_one, alone):
    model = language_model(LLAMA)
    if second:
        model.add_adapter("second", config_of(r=2, lora_alpha=5, target_modules="all-linear", lora_bias=False))
        randomised(model.double(), seed=4).base_model.set_adapter(["default", "second"])
    ids = torch.randint(0, 32, (2, 5))
    wanted = results(model, ids)
    report = accelerate(model)
    assert len(report.served) == 14
    assert len(report.groups) == len(report.mlps) == 2
    assert_same(results(model, ids), wanted, 1e-10)
    assert (groups, len(as_one), len(alone)) == ([3, 3], 2, 2)


def test_a_scale_that_changes_between_two_layers_of_a_group(groups):
    """The result that waits for the second is of the scale that was."""
    model = language_model(LLAMA)
    plain = twin_of(model)
    accelerate(model)
    for each in (model, plain):
        attention = each.base_model.model.model.layers[0].self_attn
        query, key = attention.q_proj, attention.k_proj
        query.register_forward_hook(lambda *_, key=key: key.set_scale("default", 3.0))
    ids = torch.randint(0, 32, (2, 5))
    assert_same(results(model, ids), results(plain, ids), 1e-10)


@pytest.mark.parametrize("inside", ["base_layer", "lora_A", "lora_B"])
def test_a_hook_inside_a_layer_that_waits(inside, groups):
    """It is called, though the layer's result is there already."""
    model = language_model(QWEN3)
    accelerate(model)
    attention = model.base_model.model.model.layers[0].self_attn
    child = attention.k_proj.base_layer if inside == "base_layer" else getattr(attention.k_proj, inside)["default"]
    calls = []
    attention.q_norm.register_forward_hook(lambda *_: child.register_forward_hook(lambda *_: calls.append(1)) and None)
    results(model, torch.randint(0, 32, (2, 5)))
    assert (groups[0], calls) == (3, [1])


def test_without_fusion(groups, as_one, alone):
    model = language_model(LLAMA)
    report = accelerate(model, fuse="off")
    assert not report.groups
    assert not report.mlps
    results(model, torch.randint(0, 32, (2, 5)))
    assert (groups, as_one, len(alone)) == ([], [], 14)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compiled(p, groups, as_one):
    model = language_model(LLAMA, lora_dropout=p).train()
    accelerate(model)
    ids = torch.randint(0, 32, (2, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for each in (model, compiled):
        torch.manual_seed(5)
        found.append({name.removeprefix("_orig_mod."): value for name, value in results(each, ids).items()})
    assert_same(found[1], found[0], 1e-10)


def test_compiled_before_it_ran(alone):
    """In inference mode first: what a compiled call makes is of no use to others. And the adapter is changed."""
    model = add_second(net())
    plain = twin_of(model)
    accelerate(model)
    model.base_model.model.up._scales.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x_of()), plain(x_of()))
    for name in ("default", "second"):
        for each in (model, plain):
            each.set_adapter(name)
        wanted = results(plain, x_of())
        assert_same(results(model, x_of()), wanted, 1e-12)
        got = {name.removeprefix("_orig_mod."): value for name, value in results(compiled, x_of()).items()}
        assert_same(got, wanted, 1e-12)


def test_scales_are_made_before_a_call():
    """So compiled calls find them."""
    model = add_second(net())
    accelerate(model)
    assert set(model.base_model.model.up._scales) == {"", "default", "second"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_dropout(reentrant, groups, as_one):
    """A recomputed pass drops what the first one dropped."""
    model = language_model(LLAMA, lora_dropout=0.1).train()
    accelerate(model)
    ids, found = torch.randint(0, 32, (2, 5)), []
    for checkpoints in (False, True):
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        found.append(results(model, ids, use_cache=False))
    assert_same(found[1], found[0], 1e-10)


def test_all_of_it_is_a_layer_of_pefts():
    model = net()
    before = {name: type(module).__name__ for name, module in model.named_modules()}
    accelerate(model)
    layer = model.base_model.model.up
    assert isinstance(layer, AcceleratedLinear)
    assert isinstance(layer, peft.tuners.lora.LoraLayer)
    assert isinstance(layer, peft.tuners.lora.Linear)
    assert isinstance(layer, nn.Module)
    assert {name: type(module).__name__ for name, module in model.named_modules()} == before
