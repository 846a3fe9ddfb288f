"""Batches whose samples name their adapters (adapter_names): PEFT's own results, by one op for each layer."""

import copy
import pickle

import peft
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config

from fused_lora import ops
from fused_lora.integrations.peft import accelerate, restore
from fused_lora.integrations.peft.by_name import _samples

from .models import GPT2, LLAMA, assert_same, config_of, language_model, net, randomised, results, twin_of
from .naming import BATCHES, TOLERANCE, both, check, with_others, x_of

pytestmark = pytest.mark.filterwarnings("default")


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
