"""Batches whose samples name their adapters (adapter_names): PEFT's own results, by one op for each layer."""

import copy
import pickle

import peft
import pytest
import torch
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from transformers import AutoModelForSeq2SeqLM, T5Config

from fused_lora import explain, ops
from fused_lora.integrations.peft import accelerate, linear, restore
from fused_lora.integrations.peft.by_name import _samples
from fused_lora.ops import segmented

from .models import GPT2, LLAMA, assert_same, config_of, language_model, net, randomised, results, twin_of

pytestmark = pytest.mark.filterwarnings("default")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
BATCHES = {
    "in order": ["default", "default", "second", "third"],
    "base in between": ["default", "__base__", "second", "__base__"],
    "interleaved": ["second", "default", "second", "default", "third", "second"],
    "one": ["third"],
    "a tuple": ("second", "default"),
}


@pytest.fixture
def routed(monkeypatch):
    """The linears that ops.lora_segments computes, on a CPU too, for which no kernels are."""
    monkeypatch.setattr(linear, "kernel_obstacle", lambda *args: None)
    calls, real = [], ops.lora_segments
    monkeypatch.setattr(ops, "lora_segments", lambda x, each: (calls.extend(each), real(x, each))[1])
    return calls


def x_of(samples, dtype=torch.float64):
    return torch.randn(samples, 5, 9, generator=torch.Generator().manual_seed(3)).to(dtype)


def with_others(model, **options):
    """Adapters of other ranks, one of which is not everywhere."""
    model.add_adapter("second", config_of(**{"r": 8, "use_rslora": True, "lora_alpha": 3, **options}))
    model.add_adapter("third", config_of(**{"r": 70, "target_modules": ["up"], **options}))
    dtype = model.base_model.model.up.lora_A["default"].weight.dtype
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return randomised(model, seed=4).eval()


def both(**options):
    """The same model twice, the second one accelerated."""
    plain = with_others(net(**options))
    model = twin_of(plain)
    accelerate(model)
    return plain, model


def check(plain, model, names, tolerance=1e-12, dtype=torch.float64):
    x = x_of(len(names), dtype)
    assert_same(results(model, x, adapter_names=names), results(plain, x, adapter_names=names), tolerance)


@pytest.mark.parametrize("names", BATCHES.values(), ids=BATCHES)
def test_outputs_and_gradients(names, routed):
    check(*both(), names)
    assert len(routed) == (2 if {*names} & {"default", "second"} else 1)


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype, adapters, routed):
    tolerance = max(TOLERANCE[dtype], TOLERANCE[adapters])
    check(*both(dtype=dtype, adapters=adapters), BATCHES["interleaved"], tolerance, dtype)
    assert len(routed) == 2


def test_autocast(routed):
    plain, model = both(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        check(plain, model, BATCHES["interleaved"], TOLERANCE[torch.bfloat16], torch.float32)
    assert len(routed) == 2


def test_all_base_is_the_bases_bits(routed):
    plain, model = both()
    check(plain, model, ["__base__"] * 3, 0)
    assert not routed


def test_many_samples_of_many_adapters(routed):
    """In any order, over several blocks of rows."""
    plain = net().eval()
    for number in range(20):
        plain.add_adapter(f"a{number}", config_of(r=1 + 5 * number))
    randomised(plain.double(), seed=4)
    model = twin_of(plain)
    accelerate(model)
    order = torch.randint(0, 20, (120,), generator=torch.Generator().manual_seed(5)).tolist()
    check(plain, model, [f"a{number}" for number in order])
    assert len(routed) == 2


def test_a_base_stored_the_other_way(routed):
    plain = language_model(GPT2, target_modules=["c_attn"], fan_in_fan_out=True).eval()
    model = twin_of(plain)
    accelerate(model)
    ids, names = torch.randint(0, 32, (2, 5)), ["default", "__base__"]
    assert_same(results(model, ids, adapter_names=names), results(plain, ids, adapter_names=names), 1e-10)
    assert len(routed) == 2


# language models


def language_models():
    plain = language_model(LLAMA)
    plain.add_adapter("second", config_of(r=8, target_modules=["q_proj", "down_proj"]))
    randomised(plain.double(), seed=4).eval()
    model = twin_of(plain)
    accelerate(model)
    return plain, model


def test_a_language_model(routed, groups, as_one):
    """Nothing is computed together; rows are divided once for all layers."""
    plain, model = language_models()
    ids, names = torch.randint(0, 32, (3, 5)), ["second", "__base__", "default"]
    _samples.cache_clear()
    assert_same(results(model, ids, adapter_names=names), results(plain, ids, adapter_names=names), 1e-10)
    assert (len(routed), groups, as_one) == (14, [], [])
    assert _samples.cache_info().misses == 2  # of layers with both adapters, and of those with one
    results(model, ids)
    assert (len(routed), groups, len(as_one)) == (14, [3, 3], 2)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_copies_factors_once(beams, routed, monkeypatch):
    plain, model = language_models()
    ids, names = torch.randint(3, 32, (3, 4)), ["second", "default", "__base__"]
    options = {"adapter_names": names, "max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams}
    options |= {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    copied, real = [], torch.Tensor.copy_
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda self, other: (copied.append(1), real(self, other))[1])
        got = model.generate(input_ids=ids, **options)
    assert torch.equal(got, plain.generate(input_ids=ids, **options))
    assert len(routed) == 14 * 6
    assert len(copied) == 2 * (14 + 4)


def test_beams_behind_an_encoder(routed):
    """Whose samples are not repeated."""
    config = T5Config(
        vocab_size=32, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=3, decoder_start_token_id=0,
        feed_forward_proj="gated-silu",
    )  # fmt: skip
    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(config).double()
    plain = peft.get_peft_model(base, config_of(target_modules=["q", "v", "wi_0"], task_type="SEQ_2_SEQ_LM"))
    plain.add_adapter("second", config_of(r=8, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    randomised(plain.double(), seed=4).eval()
    model = twin_of(plain)
    accelerate(model)
    ids, names = torch.randint(3, 32, (2, 4)), ["second", "default"]
    options = {"adapter_names": names, "num_beams": 3, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    options |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(**options), plain.generate(**options))
    assert len(routed) > 3


# what changes between calls


def fill(model):
    with torch.no_grad():
        model.base_model.model.up.lora_A["second"].weight.mul_(-2)


def exchange(model):
    randomised(model, seed=6)


def exchange_twice(model):
    """Where the second one may lie where the first was."""
    randomised(model, seed=6)
    randomised(model, seed=7)


def cut(model):
    """To fewer ranks, in the same memory."""
    layer = model.base_model.model.up
    layer.lora_A["second"].weight.data = layer.lora_A["second"].weight.data[:2]
    layer.lora_B["second"].weight.data = layer.lora_B["second"].weight.data[:, :2]


def widen(model):
    layer = model.base_model.model.up
    for factors, rows, columns in ((layer.lora_A, 200, 9), (layer.lora_B, 13, 200)):
        factors["second"].weight.data = torch.ones(rows, columns, dtype=torch.float64) / 9


def rescale(model):
    model.base_model.model.up.set_scale("second", 2.5)


def delete(model):
    model.delete_adapter("second")
    torch.manual_seed(9)
    model.add_adapter("second", config_of(r=5))
    randomised(model.double(), seed=8).eval()


def load(model):
    state = {name: 2 * value for name, value in model.state_dict().items() if "lora_" in name}
    model.load_state_dict(state, strict=False)


def cast(model):
    """To another dtype, and back."""
    model.float().double()


@pytest.mark.parametrize("change", [fill, exchange, exchange_twice, cut, widen, rescale, delete, load, cast])
def test_what_changes_between_calls(change, routed):
    plain, model = both()
    names = BATCHES["interleaved"]
    check(plain, model, names)
    for _ in range(2):
        for each in (plain, model):
            change(each)
        check(plain, model, names)
    check(plain, model, names[::-1])
    assert len(routed) == 8


def test_what_is_changed_in_inference_mode(routed):
    """Tensors of inference mode do not say that they were."""
    with torch.inference_mode():
        plain = with_others(net())
        model = copy.deepcopy(plain)
        accelerate(model)
        x, names = x_of(4), BATCHES["in order"]
        for factor in (1, -2):
            for each in (plain, model):
                each.base_model.model.up.lora_A["second"].weight.mul_(factor)
            torch.testing.assert_close(model(x, adapter_names=names), plain(x, adapter_names=names))
    assert len(routed) == 4


def test_in_inference_mode_first(routed):
    plain, model = both()
    names = BATCHES["in order"]
    _samples.cache_clear()
    with torch.inference_mode():
        torch.testing.assert_close(model(x_of(4), adapter_names=names), plain(x_of(4), adapter_names=names))
    check(plain, model, names)
    assert len(routed) == 4


def test_a_change_between_forward_and_backward_is_an_error(routed):
    _, model = both()
    loss = model(x_of(2), adapter_names=["default", "second"]).sum()
    fill(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_batch_between_forward_and_backward(routed):
    """What it copies is not read by the first one's backward pass."""
    plain, model = both()
    x, names = x_of(2), ["default", "__base__"]
    y = model(x, adapter_names=names)
    fill(model)
    widen(model)
    model(x_of(2), adapter_names=["second", "third"])
    y.sum().backward()
    plain(x, adapter_names=names).sum().backward()
    got, want = (each.base_model.model.up.lora_A["default"].weight.grad for each in (model, plain))
    torch.testing.assert_close(got, want)


def test_copies_are_no_part_of_the_model(routed):
    plain, model = both()
    model(x_of(1), adapter_names=["third"])
    up = model.base_model.model.up
    assert list(model.state_dict()) == list(plain.state_dict())
    for twin in (copy.deepcopy(up), pickle.loads(pickle.dumps(up))):
        assert twin._copies is not up._copies
        assert twin._copies._slab is None
    restore(model)
    assert not hasattr(up, "_copies")


# what is left to PEFT


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
    assert reason == segmented.obstacle_on(torch.device("cpu"), torch.float64, 128, True)
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


@pytest.mark.gpu
def test_on_a_gpu():
    """In bf16, prefilling and one row for each sample, with what the report promises."""
    plain = language_model(LLAMA).to("cuda", torch.bfloat16)
    for number in range(9):
        plain.add_adapter(f"a{number}", config_of(r=8 * number + 3, target_modules="all-linear"))
    randomised(plain.to("cuda", torch.bfloat16), seed=4).eval()
    model = twin_of(plain)
    reasons = {*accelerate(model).kept_by_name.values()}
    if reasons:
        pytest.skip(str(reasons))
    calls, real = [], ops.lora_segments
    names = [f"a{number}" for number in (3, 1, 4, 1, 5, 8, 2, 6)] + ["__base__", "default"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "lora_segments", lambda x, each: (calls.extend(each), real(x, each))[1])
        for length in (60, 1):
            ids = torch.randint(0, 32, (len(names), length), device="cuda")
            exact = results(twin_of(plain).double(), ids, adapter_names=names)["y"]
            got, pefts = (results(each, ids, adapter_names=names)["y"].double() for each in (model, plain))
            assert (got - exact).norm() <= 1.2 * (pefts - exact).norm()
    assert len(calls) == 28


def test_derivatives_of_torch_func_are_pefts(routed):
    plain, model = both()
    x, names = x_of(2), ["default", "second"]
    parameters = {name: each.detach() for name, each in plain.named_parameters() if "lora_" in name}

    def gradients(of):
        loss = lambda tensors: torch.func.functional_call(of, tensors, (x,), {"adapter_names": names}).sum()  # noqa: E731
        return torch.func.grad(loss)(parameters)

    assert_same(gradients(model), gradients(plain), 1e-12)
    assert not routed
