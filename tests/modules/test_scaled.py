"""The scale: one tensor beside the weight, which follows from lora_alpha, r and use_rslora and from nothing else."""

import copy

import pytest
import torch
from torch import nn

from fused_lora import LoRALinear
from fused_lora.ops import merge_and_reinit_
from tests.modules.test_lora_linear_state import copied, inputs, trained

pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")

STAYING = [
    lambda layer: layer.to(layer.weight.device),
    lambda layer: layer.float(),
    lambda layer: layer.to(torch.bfloat16).half(),
    lambda layer: layer.requires_grad_(False).eval(),
    lambda layer: layer.load_state_dict(copied(layer)),
    lambda layer: layer.load_state_dict(copied(layer), assign=True),
    lambda layer: setattr(layer, "lora_alpha", 2.0),
    lambda layer: setattr(layer, "use_rslora", True),
    lambda layer: layer.to_empty(device=layer.weight.device),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("act", STAYING)
def test_the_scale_is_one_tensor_while_the_weight_stays(act, device):
    layer = LoRALinear(5, 4, 2, 3.0, device=device)
    scale = layer.scale
    act(layer)
    assert layer.scale is scale


def replica(layer):
    """As DataParallel makes it, with parameters that are plain tensors."""
    twin = layer._replicate_for_data_parallel()
    for name in ("weight", "lora_A", "lora_B", "bias"):
        setattr(twin, name, getattr(layer, name).detach().double())
    return twin


def assigned(layer):
    layer.weight = nn.Parameter(layer.weight.detach().double(), requires_grad=False)
    return layer


def written(layer):
    layer.weight.data = layer.weight.data.double()
    return layer


def loaded(layer):
    state = {name: tensor.double() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    return layer


@pytest.mark.parametrize("move", [lambda layer: layer.double(), replica, assigned, written, loaded])
def test_the_scale_follows_the_weight(move):
    layer = LoRALinear(5, 4, 3, 2.0)
    moved = move(layer)
    assert moved.scale.dtype is torch.float64
    assert moved.scale.item() == 2 / 3
    assert moved.scale is moved.scale


def test_a_scale_that_inference_made_is_trained_with():
    layer = written(LoRALinear(5, 4, 3, 2.0))
    x = torch.randn(3, 5, dtype=torch.float64)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    layer.lora_alpha = 3.0


def test_no_buffer():
    layer = LoRALinear(5, 4, 3)
    assert list(layer.buffers()) == []
    with pytest.raises(AttributeError):
        layer.scale = torch.ones(())
    with pytest.raises(AttributeError):
        layer.r = 4


@pytest.mark.parametrize(("name", "value", "scaling"), [("lora_alpha", 6.0, 1.5), ("use_rslora", True, 1.0)])
def test_what_the_scale_follows_from_can_be_set(name, value, scaling):
    layer = LoRALinear(12, 10, 4, 2.0)
    nn.init.normal_(layer.lora_B)
    scale, x = layer.scale, inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        setattr(layer, name, value)
        after = compiled(x)
    assert (layer.scale, layer.scaling, layer.scale.item()) == (scale, scaling, scaling)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(after - plain, (before - plain) * scaling / 0.5)
    layer.merge_()
    with pytest.raises(RuntimeError, match=f"{name} cannot change while the update is merged"):
        setattr(layer, name, value)


def test_a_bad_alpha_is_refused():
    layer = LoRALinear(12, 10, 4, 2.0)
    with pytest.raises(ValueError, match="lora_alpha must be finite"):
        layer.lora_alpha = float("inf")
    assert (layer.lora_alpha, layer.scale.item()) == (2.0, 0.5)


def test_float64_is_computed_with_a_scale_of_float64():
    layer = trained(dtype=torch.float64).first
    x, A, B = inputs(torch.float64), layer.lora_A.detach(), layer.lora_B.detach()
    y = layer(x)
    y.sum().backward()
    update = 5 / 3 * B @ A
    exact = {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight + update, layer.bias), **exact)
    torch.testing.assert_close(layer.lora_A.grad, 5 / 3 * B.sum(0)[:, None] * x.sum(0), **exact)
    weight = layer.weight.clone()
    torch.testing.assert_close(layer.to_linear().weight.detach(), weight + update, **exact)
    torch.testing.assert_close(layer.merge_().weight.detach(), weight + update, **exact)
    layer.unmerge_()
    merge_and_reinit_([layer.weight], [A], [B], [layer.scale], [0])
    torch.testing.assert_close(layer.weight.detach(), weight + update, **exact)


def as_once_pickled(layer):
    """With its attributes of the time when the scale was a buffer."""
    state = dict(layer.__dict__)
    for name in ("r", "lora_alpha", "use_rslora"):
        state[name] = state.pop(f"_{name}")
    state["_buffers"] = {"scale": state.pop("_scale").float()}
    state["_non_persistent_buffers_set"] = {"scale"}
    old = LoRALinear.__new__(LoRALinear)
    old.__setstate__(copy.deepcopy(state))
    return old


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_layer_that_was_pickled_when_the_scale_was_a_buffer(dtype):
    layer = trained(dtype=dtype).first
    old = as_once_pickled(layer)
    assert torch.equal(old(inputs(dtype)), layer(inputs(dtype)))
    assert list(old.named_buffers()) == []
    assert repr(old) == repr(layer)
    old.lora_alpha = 9.0
    assert old.scale.item() == 3.0
    assert torch.equal(copy.deepcopy(old)(inputs(dtype)), old(inputs(dtype)))
