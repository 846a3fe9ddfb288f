"""An update merged into a weight in a format, out of it again, and into a plain model."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import parametrize

from fused_lora import LoRALinear, merge_and_unload, replace_linear
from fused_lora.formats import NF4, dequantise, merging
from tests.modules.bases import Net, assert_same, base_state, every_format, linear, net, trained


def total_of(layer):
    """What a layer computes with, by hand; lora_alpha / r is 5/3."""
    update = 5 / 3 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return dequantise(layer.frozen_weight).double() + update


def with_an_update(form, size, dtype=torch.float32):
    """Of a size beside W."""
    layer = trained(form, K=257, N=130, dtype=dtype)
    W = dequantise(layer.frozen_weight)
    with torch.no_grad():
        layer.lora_B.mul_(size * W.norm() / (total_of(layer) - W).norm())
    return layer


def everything(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_is_the_nearest_of_the_sum(dtype, form):
    """peft 3741: a scale was dropped. Megatron-Bridge 5384: the update was added to packed bytes."""
    layer = with_an_update(form, 0.5, dtype)
    total, bias = total_of(layer), layer.bias.detach().clone()
    pointers = [tensor.data_ptr() for tensor in layer.frozen_tensors() if tensor is not None]
    assert layer.merge_() is layer
    assert layer.merged
    assert [tensor.data_ptr() for tensor in layer.frozen_tensors() if tensor is not None] == pointers
    W = dequantise(layer.frozen_weight).double()
    afresh = dequantise(form.quantise(total.float())).double()
    assert (W - total).norm() <= 1.01 * (afresh - total).norm()
    assert (W - total).norm() < 0.2 * total.norm()
    x = torch.randn(7, 257, dtype=dtype)
    wanted = x.double() @ W.T + bias.double()
    error = (layer(x).double() - wanted).norm() / wanted.norm()
    assert error < (1e-5 if dtype is torch.float32 else 1e-2)
    assert not layer(x).requires_grad


@every_format
def test_merged_computes_what_unmerged_does(form):
    """As nearly as codes can hold it."""
    layer, x = with_an_update(form, 0.5), torch.randn(50, 257)
    before = layer(x).detach()
    plain = layer._plainly(x)
    layer.merge_()
    assert (layer(x) - before).norm() < 0.15 * before.norm()
    assert (plain - before).norm() > 0.3 * before.norm()


@every_format
@pytest.mark.parametrize("size", [1e-3, 1.0])
@pytest.mark.filterwarnings("ignore:.* of the update arrived")
def test_the_bits_come_back(size, form):
    layer, x = with_an_update(form, size, torch.bfloat16), torch.randn(4, 257, dtype=torch.bfloat16)
    before, y = base_state(layer), layer(x)
    for _ in range(3):
        layer.merge_()
        if size == 1.0:
            assert any(not torch.equal(own, before[name][0]) for name, (own, _) in base_state(layer).items())
        assert layer.unmerge_() is layer
        assert_same(before, base_state(layer))
    assert torch.equal(layer(x), y)
    assert not layer.merged
    assert layer.get_extra_state().dim() == 0


@every_format
def test_what_arrived_is_told(form):
    """A share that is little, in words; by hand, along the update."""
    layer = with_an_update(form, 1e-3)
    before, total = dequantise(layer.frozen_weight).double(), total_of(layer)
    with pytest.warns(UserWarning, match=r"^-?\d+\.\d% of the update arrived in its quantised weight") as told:
        layer.merge_()
    assert told[0].filename == __file__
    update, change = total - before, dequantise(layer.frozen_weight).double() - before
    share = float((change * update).sum() / (update * update).sum())
    assert layer.arrived.share == pytest.approx(share, rel=1e-3, abs=1e-3)
    assert layer.arrived.share < 0.2
    assert str(told[0].message).startswith(f"{layer.arrived.share:.1%}")
    layer.unmerge_()
    assert layer.arrived is None
    layer = with_an_update(form, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.merge_()
    assert layer.arrived.share > 0.9


def test_a_plain_layer_tells_nothing():
    layer = LoRALinear.from_linear(linear(), 3, 5.0)
    nn.init.normal_(layer.lora_B)
    layer.merge_()
    assert layer.arrived is None
    assert layer.get_extra_state().dtype is torch.bool


def by_state_dict(source, target):
    target.load_state_dict(source.state_dict())
    return target


def by_assignment(source, target):
    target.load_state_dict(everything(source), assign=True)
    return target


def by_torch_save(source, target):
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    return target


def by_safetensors(source, target):
    target.load_state_dict(load(save(everything(source))))
    return target


WAYS = [
    by_state_dict, by_assignment, by_torch_save, by_safetensors, lambda source, _: copy.deepcopy(source),
    lambda source, _: pickle.loads(pickle.dumps(source)), lambda source, _: source.to(torch.float16).float(),
]  # fmt: skip


@pytest.mark.parametrize("way", range(len(WAYS)))
@every_format
def test_a_merged_layer_elsewhere(form, way):
    """It is merged there too, and comes out of it to the bits of the first."""
    source = with_an_update(form, 0.5)
    before = base_state(source)
    source.merge_()
    merged, x = base_state(source), torch.randn(3, 257)
    found = WAYS[way](source, with_an_update(form, 0.7))
    assert found.merged
    assert_same(merged, base_state(found))
    torch.testing.assert_close(found(x), source(x))
    found.unmerge_()
    assert_same(before, base_state(found))


@every_format
def test_a_layer_that_is_not_merged_into_one_that_is(form):
    source, target = with_an_update(form, 0.5), with_an_update(form, 0.7)
    target.merge_()
    target.load_state_dict(source.state_dict())
    assert (target.merged, target.arrived, target.get_extra_state().dim()) == (False, None, 0)
    assert_same(base_state(source), base_state(target))


@every_format
@pytest.mark.parametrize("state", [torch.tensor(True), torch.zeros(9, dtype=torch.uint8), torch.zeros(130)])
def test_a_merged_weight_without_what_it_was_is_refused(state, form):
    source, target = with_an_update(form, 0.5), with_an_update(form, 0.7)
    source.merge_()
    before = base_state(target)
    with pytest.raises(RuntimeError, match=r"LoRALinear: the checkpoint's weight is merged, and its _extra_state must"):
        target.load_state_dict(source.state_dict() | {"_extra_state": state})
    assert_same(before, base_state(target))
    assert not target.merged


@every_format
def test_a_state_without_a_weight_leaves_a_merged_layer_as_it_is(form):
    layer = with_an_update(form, 0.5)
    before = base_state(layer)
    layer.merge_()
    layer.load_state_dict({"_extra_state": torch.tensor(False)}, strict=False)
    assert layer.merged
    assert layer.arrived is not None
    layer.unmerge_()
    assert_same(before, base_state(layer))


@every_format
def test_a_merge_that_breaks_off_leaves_the_layer(form, monkeypatch):
    layer = with_an_update(form, 0.5)
    before, real = base_state(layer), merging._write

    def broken(*arguments):
        real(*arguments)
        assert any(not torch.equal(own, before[name][0]) for name, (own, _) in base_state(layer).items())
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        layer.merge_()
    assert (layer.merged, layer.arrived) == (False, None)
    assert_same(before, base_state(layer))


@every_format
def test_what_is_not_merged(form):
    """Each is said before anything changes."""
    dora, infinite, huge = trained(form, use_dora=True), trained(form), trained(form)
    with torch.no_grad():
        infinite.lora_B[3, 1] = torch.inf
        huge.lora_B[:], huge.lora_A[:] = 1e30, 1e30
    for layer, error, words in (
        (dora, NotImplementedError, "weight is quantised, and DoRA is not merged into codes"),
        (infinite, ValueError, "lora_B must be finite"),
        (huge, ValueError, "W \\+ scale B A must be finite"),
    ):
        before = base_state(layer)
        with pytest.raises(error, match=words):
            layer.merge_()
        assert not layer.merged
        assert_same(before, base_state(layer))
    layer = trained(form)
    with pytest.raises(RuntimeError, match="the update is not merged"):
        layer.unmerge_()
    layer.merge_()
    for act in (layer.merge_, lambda: setattr(layer, "lora_alpha", 2.0), layer.reset_lora_parameters):
        with pytest.raises(RuntimeError, match="merged"):
            act()


class Twice(nn.Module):
    def forward(self, scale):
        return 2 * scale


def test_scales_that_are_made_at_each_use_are_not_merged():
    layer = trained(NF4())
    parametrize.register_parametrization(layer, "weight_scale", Twice())
    with pytest.raises(ValueError, match="weight_scale must be a parameter to be merged"):
        layer.merge_()


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_and_unload(dtype, form):
    """unsloth-zoo 810: what was trained over and the update, rounded once; a plain layer beside them as ever."""
    model = net(form, dtype=dtype)
    model.third = LoRALinear.from_linear(linear(9, 5, dtype), 3, 5.0)
    model.fourth = LoRALinear.from_linear(linear(9, 5, dtype), 3, 5.0, base=form, use_dora=True)
    totals = {name: total_of(getattr(model, name)) for name in ("first", "second")}
    x = torch.randn(6, 70, dtype=dtype)
    y = model(x).detach()
    pointer, dora = model.third.weight.data_ptr(), model.fourth.to_linear().weight
    assert merge_and_unload(model) is model
    assert {type(each) for each in model.children()} == {nn.Linear}
    for name, total in totals.items():
        weight = getattr(model, name).weight
        assert (weight.dtype, weight.requires_grad) == (dtype, True)
        assert (weight.double() - total).abs().max() <= torch.finfo(dtype).eps * total.abs().max()
    assert model.third.weight.data_ptr() == pointer
    assert torch.equal(model.fourth.weight, dora)
    assert (model(x) - y).norm() < (1e-5 if dtype is torch.float32 else 2e-2) * y.norm()


@every_format
def test_a_merged_layer_is_unloaded_as_it_computes(form):
    layer = with_an_update(form, 0.5)
    total = total_of(layer)
    layer.merge_()
    W = dequantise(layer.frozen_weight)
    for plain in (layer.to_linear(), merge_and_unload(copy.deepcopy(layer))):
        assert torch.equal(plain.weight, W)
    assert not torch.allclose(W.double(), total, rtol=1e-5)
    layer.unmerge_()
    torch.testing.assert_close(layer.to_linear().weight.double(), total, rtol=1e-5, atol=1e-5)


@every_format
def test_a_model_is_unloaded_whole_or_not_at_all(form):
    model = Net()
    replace_linear(model, 3, 5.0, target_modules=["first"])
    replace_linear(model, 3, 5.0, target_modules=["second"], base=form)
    for layer in (model.first, model.second):
        nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        model.second.lora_A[0, 0] = torch.nan
    before = everything(model)
    with pytest.raises(ValueError, match=r"second: lora_A must be finite"):
        merge_and_unload(model)
    assert isinstance(model.first, LoRALinear)
    assert not model.first.merged
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if "lora" not in name)
