"""LoRALinear: what it starts as, what it stores, and what survives copying, moving, merging and unmerging."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fused_lora import LoRALinear
from fused_lora.reference import lora_linear_ref
from tests.accuracy import assert_accurate
from tests.ops.problem import DEVICES

PARAMETERS = {"weight", "bias", "lora_A", "lora_B"}
NAMES = PARAMETERS | {"_extra_state"}


def trained(K=40, N=30, r=6, **options):
    """A layer whose update is not zero; lora_alpha / r is 1.5."""
    layer = LoRALinear(K, N, r, **{"lora_alpha": 1.5 * r} | options)
    nn.init.normal_(layer.lora_B)
    return layer


def reference(layer, x):
    """The layer's function in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    A, B = layer.lora_A.double(), layer.lora_B.double()
    return lora_linear_ref(x.double(), layer.weight.double(), A, B, bias, layer.scaling).detach()


@pytest.mark.parametrize("lora_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_init(bias, dtype, lora_dtype):
    K, N, r = 400, 30, 6
    layer = LoRALinear(K, N, r, 3.0, bias=bias, dtype=dtype, lora_dtype=lora_dtype)
    assert layer.weight.shape == (N, K)
    assert (layer.bias is not None) == bias
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((r, K), (N, r))
    assert {layer.lora_A.dtype, layer.lora_B.dtype} == {lora_dtype or dtype}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert torch.count_nonzero(layer.lora_B) == 0
    # U(-bound, bound): inside its bounds, as wide as they are, as spread as it should be.
    bound, A = K**-0.5, layer.lora_A.detach().double()
    assert 0.98 * bound < A.abs().max() <= bound * 1.01
    assert abs(A.std() / (bound / math.sqrt(3)) - 1) < 0.05
    assert abs(A.mean()) < 5 * bound / math.sqrt(3 * A.numel())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
def test_a_new_layer_computes_what_the_linear_did(lora_dropout, device):
    linear = nn.Linear(40, 30, device=device)
    x = torch.randn(5, 7, 40, device=device)
    want = linear(x)
    layer = LoRALinear.from_linear(linear, 6, 9.0, lora_dropout)
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward(bias, device):
    layer = trained(bias=bias, device=device)
    x = torch.randn(50, 40, device=device)
    unfused = lora_linear_ref(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.scaling).detach()
    assert_accurate("y", layer(x).detach(), reference(layer, x), unfused)


@pytest.mark.parametrize(("r", "lora_alpha"), [(6, 9.0), (16, 40), (3, 1.0)])
def test_scaling(r, lora_alpha):
    layer = LoRALinear(8, 8, r, lora_alpha)
    stabilised = LoRALinear(8, 8, r, lora_alpha, use_rslora=True)
    assert layer.scaling == pytest.approx(lora_alpha / r)
    assert stabilised.scaling == pytest.approx(lora_alpha / math.sqrt(r))
    for each in (layer, stabilised):
        assert each.scale.item() == torch.tensor(each.scaling, dtype=torch.float32).item()


def test_a_new_alpha():
    layer = trained()
    x = torch.randn(5, 40)
    pointer = layer.scale.data_ptr()
    layer.set_lora_alpha(15.0)
    assert (layer.lora_alpha, layer.scaling, layer.scale.item()) == (15.0, 2.5, 2.5)
    assert layer.scale.data_ptr() == pointer
    torch.testing.assert_close(layer(x), reference(layer, x).float())
    with pytest.raises(ValueError, match="lora_alpha must be finite"):
        layer.set_lora_alpha(float("nan"))
    assert layer.lora_alpha == 15.0
    layer.merge_()
    with pytest.raises(RuntimeError, match="merged"):
        layer.set_lora_alpha(1.0)
    assert (layer.lora_alpha, layer.scale.item()) == (15.0, 2.5)


def test_dropout_acts_in_training_only():
    layer = trained(lora_dropout=0.5)
    x = torch.randn(5, 40)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), reference(layer, x).float())


@pytest.mark.parametrize("train_bias", [True, False])
@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=str)
def test_from_linear(lora_dtype, train_bias):
    linear = nn.Linear(40, 30, dtype=torch.bfloat16).eval()
    weight, bias = linear.weight, linear.bias
    layer = LoRALinear.from_linear(linear, 6, 9.0, lora_dtype=lora_dtype, train_bias=train_bias)
    assert layer.weight is weight
    assert layer.bias is bias
    assert not weight.requires_grad
    assert bias.requires_grad is train_bias
    assert layer.lora_A.dtype is (lora_dtype or torch.bfloat16)
    assert not layer.training
    assert (layer.in_features, layer.out_features, layer.r, layer.lora_alpha) == (40, 30, 6, 9.0)
    assert layer.scale.item() == 1.5
    layer(torch.randn(5, 40, dtype=torch.bfloat16)).sum().backward()
    assert weight.grad is None
    assert (bias.grad is not None) == train_bias
    assert layer.lora_B.grad is not None


def test_from_linear_without_bias_on_meta():
    layer = LoRALinear.from_linear(nn.Linear(40, 30, bias=False, device="meta"), 6, 9.0, train_bias=True)
    assert layer.bias is None
    assert {t.device.type for t in (*layer.parameters(), layer.scale)} == {"meta"}


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict(bias):
    layer = trained(bias=bias)
    state = layer.state_dict()
    assert set(state) == (NAMES if bias else NAMES - {"bias"})
    assert {name for name, _ in layer.named_parameters()} == set(state) & PARAMETERS
    other = trained(bias=bias)
    assert not torch.equal(other.lora_A, layer.lora_A)
    other.load_state_dict(state)
    x = torch.randn(5, 40)
    assert torch.equal(other(x), layer(x))
    # And the linear's own checkpoint loads, but for the factors.
    missing, unexpected = layer.load_state_dict(nn.Linear(40, 30, bias=bias).state_dict(), strict=False)
    assert (set(missing), unexpected) == ({"lora_A", "lora_B"}, [])


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
@pytest.mark.parametrize("merged", [True, False])
def test_copies(merged, duplicate):
    layer = trained(use_rslora=True, lora_dropout=0.25).eval()
    if merged:
        layer.merge_()
    twin = duplicate(layer)
    x = torch.randn(5, 40)
    assert torch.equal(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    if merged:
        twin.unmerge_()
        assert layer.merged
    with torch.no_grad():
        twin.lora_B.zero_()
    twin.set_lora_alpha(1.0)
    assert torch.count_nonzero(layer.lora_B) > 0
    assert layer.scale.item() == torch.tensor(layer.scaling).item()


@pytest.mark.parametrize("move", [
    lambda layer: layer.to(torch.bfloat16),
    lambda layer: layer.half(),
    lambda layer: layer.to(torch.bfloat16).float(),
    lambda layer: layer.double(),
    lambda layer: layer.double().float(),
], ids=["bf16", "fp16", "bf16-fp32", "fp64", "fp64-fp32"])  # fmt: skip
def test_the_scale_is_not_rounded_by_casts(move):
    layer = move(LoRALinear(40, 30, 3, 2.0, use_rslora=True))  # 2 / sqrt 3 has no short binary form
    dtype = torch.float64 if layer.weight.dtype is torch.float64 else torch.float32
    assert layer.scale.dtype is dtype
    assert layer.scale.item() == torch.tensor(2 / math.sqrt(3), dtype=dtype).item()
    assert layer.lora_A.dtype is layer.weight.dtype


def test_meta_and_to_empty():
    layer = LoRALinear(40, 30, 6, 9.0, device="meta")
    assert {t.device.type for t in (*layer.parameters(), layer.scale)} == {"meta"}
    source = trained()
    layer.to_empty(device="cpu")
    assert layer.scale.item() == 1.5
    layer.load_state_dict(source.state_dict())
    x = torch.randn(5, 40)
    assert torch.equal(layer(x), source(x))
    assert not layer.weight.requires_grad
    layer.reset_lora_parameters()
    assert torch.count_nonzero(layer.lora_B) == 0


def test_a_device_context():
    with torch.device("meta"):
        layer = LoRALinear(40, 30, 6, 9.0)
    assert {t.device.type for t in (*layer.parameters(), layer.scale)} == {"meta"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_and_unmerge(dtype, device):
    layer = trained(dtype=dtype, device=device, lora_dtype=torch.float32)
    x = torch.randn(50, 40, device=device, dtype=dtype)
    exact, pointer = reference(layer, x), layer.weight.data_ptr()
    plain = nn.functional.linear(x, layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A).to(dtype), layer.bias)
    assert layer.merge_() is layer
    assert layer.merged
    assert "merged" in repr(layer)
    assert_accurate("merged", layer(x).detach(), exact, plain.detach())
    assert set(layer.state_dict()) == NAMES
    with pytest.raises(RuntimeError, match="already merged"):
        layer.merge_()
    assert layer.unmerge_() is layer
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge_()
    assert layer.weight.data_ptr() == pointer
    assert_accurate("unmerged", layer(x).detach(), exact, plain.detach())


def unit(before, layer, dtype):
    """One unit in the last place of the larger of each entry's two values, before and after a merge."""
    merged = before + layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    larger = torch.maximum(before.abs(), merged.abs() * (1 + torch.finfo(dtype).eps))
    exponent = torch.frexp(larger).exponent - 1  # a GPU's pow is not exact
    return torch.ldexp(torch.ones_like(larger), exponent) * torch.finfo(dtype).eps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cycles", [1, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cycles_do_not_drift(dtype, cycles, device):
    """Each entry is within one unit in the last place of the larger of its two values, after 1 cycle or 100."""
    layer = trained(K=300, N=200, dtype=dtype, lora_dtype=torch.float32, device=device)
    before = layer.weight.detach().double()
    bound = unit(before, layer, dtype)
    for _ in range(cycles):
        layer.merge_().unmerge_()
    residual = (layer.weight.detach().double() - before).abs()
    assert (residual <= bound).all()
    if dtype is torch.float32:
        assert residual.norm() <= 1e-6 * before.norm()
    else:
        assert residual.max() > 0  # an exact return would need what 16 bits cannot hold


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("merged", [True, False])
def test_to_linear(merged, bias):
    layer = trained(bias=bias).eval()
    x = torch.randn(50, 40)
    want = layer(x)
    if merged:
        layer.merge_()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert not linear.training
    torch.testing.assert_close(linear(x), want)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert linear.weight.data_ptr() != layer.weight.data_ptr()
    assert all(p.requires_grad for p in linear.parameters())
    assert layer.merged is merged


def test_gradients_reach_the_factors_only():
    layer = trained()
    layer(torch.randn(5, 40)).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_repr():
    layer = LoRALinear(40, 30, 6, 9.0, 0.1, bias=False, use_rslora=True)
    want = "in_features=40, out_features=30, bias=False, r=6, lora_alpha=9.0, lora_dropout=0.1, use_rslora=True"
    assert repr(layer) == f"LoRALinear({want})"
