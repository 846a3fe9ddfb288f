"""LoRALinear with use_dora: the formula in float64, PEFT's values, merged and unmerged, saved and converted."""

import copy

import peft
import pytest
import torch
from torch import nn

from fused_lora import LoRALinear, explain, load_adapter, merge_and_unload, replace_linear, save_adapter
from fused_lora.relora import ReLoRA
from tests.integrations.peft.models import Net
from tests.ops.problem import DEVICES

pytestmark = pytest.mark.filterwarnings("default")  # PEFT warns of its own affairs
R, ALPHA = 3, 4.5
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def trained(layer: LoRALinear) -> LoRALinear:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.3)
        layer.lora_magnitude_vector.mul_((torch.rand(layer.out_features, generator=generator) + 0.5).to(layer.weight))
    return layer


def layer_of(dtype=torch.float64, K=9, N=7, **options) -> LoRALinear:
    torch.manual_seed(0)
    return trained(LoRALinear(K, N, R, ALPHA, dtype=dtype, use_dora=True, **options))


def x_of(dtype=torch.float64, K=9):
    return torch.randn(4, K, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def by_formula(layer, x, wide=torch.float64):
    """y of the definition, the norm detached."""
    weight, A, B, m = (t.to(wide) for t in (layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    sums = weight + layer.scaling * B @ A
    gain = m / sums.detach().norm(dim=1)
    y = gain * (x.to(wide) @ sums.T)
    return y if layer.bias is None else y + layer.bias.to(wide)


def gradients(y, x, layer):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    inputs = [x, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]
    return torch.autograd.grad((y * weights).sum(), inputs)


def test_a_new_one_computes_what_the_linear_did():
    linear = nn.Linear(9, 7, dtype=torch.float64)
    layer = LoRALinear.from_linear(linear, R, ALPHA, use_dora=True)
    torch.testing.assert_close(layer.lora_magnitude_vector, linear.weight.norm(dim=1))
    torch.testing.assert_close(layer(x_of()), linear(x_of()))
    assert "use_dora=True" in repr(layer)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, bias):
    layer, x = layer_of(dtype, bias=bias), x_of(dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    y, exact = layer(x), by_formula(layer, x)
    for got, want in zip((y, *gradients(y, x, layer)), (exact, *gradients(exact, x, layer)), strict=True):
        assert got.dtype == dtype
        assert (got.double() - want.double()).norm() < tolerance * want.double().norm()


def test_a_bias_that_trains():
    layer, x = layer_of(), x_of()
    layer.bias.requires_grad_(True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.bias)
    (want,) = torch.autograd.grad(by_formula(layer, x).square().sum(), layer.bias)
    torch.testing.assert_close(grad, want)


def test_second_derivatives():
    layer, x = layer_of(), x_of()
    for function in (layer, lambda x: by_formula(layer, x)):
        (first,) = torch.autograd.grad(function(x).sin().sum(), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, layer.lora_magnitude_vector])
        if function is layer:
            found = second
    for got, want in zip(found, second, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("way", ["parametrized", "a plain attribute"])
def test_magnitudes_that_are_no_parameter(way):
    """As torch.nn.utils.parametrize and replicas of DataParallel have them."""
    layer, x = layer_of(), x_of()
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.5)
    want = layer(x)
    if way == "parametrized":
        nn.utils.parametrize.register_parametrization(layer, "lora_magnitude_vector", nn.Identity())
    else:
        magnitudes = layer._parameters.pop("lora_magnitude_vector")
        layer.lora_magnitude_vector = magnitudes.detach()
    assert torch.equal(layer(x), want)


def test_dropout_leaves_the_base_alone():
    layer = layer_of(lora_dropout=1.0).train()
    with torch.no_grad():
        norms = (layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).norm(dim=1)
        want = layer.lora_magnitude_vector / norms * (x_of() @ layer.weight.T) + layer.bias
    torch.testing.assert_close(layer(x_of()), want)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled(device):
    layer, x = layer_of(torch.float32).to(device), x_of(torch.float32).detach().to(device).requires_grad_()
    y = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, y)
    for got, want in zip(gradients(compiled, x, layer), gradients(y, x, layer), strict=True):
        torch.testing.assert_close(got, want)


# merges


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_and_unmerged(dtype):
    layer, x = layer_of(dtype), x_of(dtype)
    y, before = layer(x).detach(), layer.weight.clone()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    linear = layer.to_linear()
    assert torch.equal(layer.weight, before)
    layer.merge_()
    assert torch.equal(layer.weight, linear.weight)
    assert (layer(x) - y).norm() < tolerance * y.norm()
    assert "it is merged" in str(explain(layer))
    layer.unmerge_()
    assert (layer.weight - before).norm() < tolerance * before.norm()
    assert (layer(x) - y).norm() < 2 * tolerance * y.norm()


def test_cycles_do_not_drift():
    """In 16 bits the first few add to what the first one lost; then the weight comes back to the same bits."""
    layer = layer_of(torch.bfloat16)
    before, lost = layer.weight.double(), []
    for _ in range(100):
        layer.merge_().unmerge_()
        lost.append((layer.weight.double() - before).norm() / before.norm())
    assert 0 < lost[0] < lost[-1] < 2**-7
    assert lost[-1] == lost[20]


@pytest.mark.parametrize("how", ["state dict", "deepcopy"])
def test_a_merged_state_can_be_unmerged_elsewhere(how):
    layer, x = layer_of(), x_of()
    y = layer(x).detach()
    layer.merge_()
    if how == "deepcopy":
        twin = copy.deepcopy(layer)
    else:
        twin = LoRALinear(9, 7, R, ALPHA, dtype=torch.float64, use_dora=True)
        twin.load_state_dict(layer.state_dict())
    assert twin.merged
    torch.testing.assert_close(twin(x), y)
    torch.testing.assert_close(twin.unmerge_()(x), y)
    assert not twin.get_extra_state()


def test_a_merged_state_without_its_magnitudes_is_refused():
    state = layer_of().merge_().state_dict()
    del state["lora_magnitude_vector"]
    with pytest.raises(RuntimeError, match="is loaded with lora_A and lora_B and lora_magnitude_vector only"):
        layer_of().load_state_dict(state, strict=False)


def test_rows_of_zeros():
    """Of a pruned weight: there is no length to bring them to."""
    linear = nn.Linear(9, 7, dtype=torch.float64)
    with torch.no_grad():
        linear.weight[2] = 0
    layer = LoRALinear.from_linear(linear, R, ALPHA, use_dora=True)
    x = x_of()
    want = linear(x).detach()
    torch.testing.assert_close(layer(x), want)
    assert all(grad.isfinite().all() for grad in gradients(layer(x), x, layer))
    before = layer.weight.clone()
    torch.testing.assert_close(layer.merge_()(x), want)
    torch.testing.assert_close(layer.unmerge_().weight, before)


def test_what_could_not_be_taken_out_is_not_merged():
    layer = layer_of()
    before = layer.weight.clone()
    for value, words in ((0.0, "must not be 0"), (float("nan"), "must be finite")):
        with torch.no_grad():
            layer.lora_magnitude_vector[1] = value
        with pytest.raises(ValueError, match=f"lora_magnitude_vector {words}"):
            layer.merge_()
        assert torch.equal(layer.weight, before)
        assert not layer.merged


# models and files


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def replaced() -> Net:
    model = net()
    for layer in replace_linear(model, R, ALPHA, use_dora=True).layers(model):
        trained(layer)
    return model


def test_pefts_values(tmp_path):
    model, x = replaced(), x_of()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-6, atol=1e-6)
    assert theirs.peft_config["default"].use_dora


def test_pefts_file(tmp_path):
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["up", "down"], use_dora=True)
    theirs = peft.get_peft_model(net(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.1 * torch.rand_like(parameter)
    theirs.save_pretrained(tmp_path)
    model, x = net(), x_of()
    load_adapter(model, tmp_path)
    assert model.up.use_dora
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-6, atol=1e-6)
    again = replaced()
    load_adapter(again, tmp_path)
    assert torch.equal(again.up.lora_magnitude_vector, model.up.lora_magnitude_vector)


def test_a_file_of_the_other_kind(tmp_path):
    plain = net()
    replace_linear(plain, R, ALPHA)
    save_adapter(plain, tmp_path)
    with pytest.raises(ValueError, match="up has use_dora=True, the config says use_dora=False"):
        load_adapter(replaced(), tmp_path)


def test_merged_and_unloaded():
    model, x = replaced(), x_of()
    y = model(x).detach()
    plain = merge_and_unload(model)
    assert type(plain.up) is nn.Linear
    torch.testing.assert_close(plain(x), y)


def test_groups_and_mlps(groups, as_one):
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(9, 11), nn.Linear(9, 11), nn.Linear(11, 9)

        def forward(self, x):
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    torch.manual_seed(0)
    alone = nn.Sequential(MLP()).double()
    replace_linear(alone, R, ALPHA, use_dora=True, fuse="off")
    for layer in (alone[0].gate, alone[0].up, alone[0].down):
        trained(layer)
    torch.manual_seed(0)
    model = nn.Sequential(MLP()).double()
    replace_linear(model, R, ALPHA, use_dora=True)
    model.load_state_dict(alone.state_dict())
    results = []
    for each in (alone, model):
        x = x_of()
        y = each(x)
        trained_ones = [parameter for parameter in each.parameters() if parameter.requires_grad]
        results.append((y, *torch.autograd.grad(y.sin().sum(), [x, *trained_ones])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert len(as_one) == 1


def test_relora_refuses_it():
    model = replaced()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="up is DoRA"):
        ReLoRA(model, optimizer, reset_every=3)
