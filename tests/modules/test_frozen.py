"""A LoRALinear over a weight in a format: what it holds and computes, and how a model gets there."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_lora import LoRALinear, explain, print_trainable_parameters, replace_linear
from fused_lora.formats import FP8, INT8, NAMED, NF4, Stored, dequantise
from fused_lora.integrations.tensor_parallel import ColwiseLoRA
from fused_lora.modules import LoRAMLP
from fused_lora.reference import lora_linear_ref
from tests.accuracy import assert_accurate
from tests.modules.bases import BASE, FORMATS, every_format, linear, net, trained

DTYPES = {FP8: torch.float8_e4m3fn, INT8: torch.int8, NF4: torch.uint8}


def passed(function, x, dy, *tensors):
    y = function(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *tensors], dy)]


def formula(layer, W, dtype):
    """Of the layer, over a weight that is given."""
    A, B, bias = (each.detach().to(dtype).requires_grad_() for each in (layer.lora_A, layer.lora_B, layer.bias))
    return lambda x: lora_linear_ref(x, W.to(dtype), A, B, bias, layer.scaling), (A, B)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("K", "N"), [(65, 33), (576, 192), (264, 1000)])
def test_what_it_computes(K, N, dtype, form):
    """Over what the codes stand for, rounded to x's dtype."""
    plain = linear(K, N, dtype)
    stored = form.quantise(plain.weight)
    layer = LoRALinear.from_linear(plain, 3, 5.0, base=form)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 35, K, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 35, N, dtype=dtype)
    got = passed(layer, x, dy, layer.lora_A, layer.lora_B)
    W = dequantise(stored, dtype)
    exact, factors = formula(layer, W, torch.float64)
    wanted = passed(exact, x.detach().double().requires_grad_(), dy.double(), *factors)
    unfused, factors = formula(layer, W, dtype)
    by_torch = passed(unfused, x, dy, *factors)
    for name, *each in zip(("y", "dx", "dA", "dB"), got, wanted, by_torch, strict=True):
        assert_accurate(name, *each)


@every_format
def test_what_it_holds(form):
    layer = trained(form, dtype=torch.bfloat16)
    state, parameters = layer.state_dict(), dict(layer.named_parameters())
    assert layer.base is form
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (
        DTYPES[type(form)],
        torch.uint8 if form == NF4(nested=True) else torch.float32,
    )
    assert ("weight_outer" in state) == (form == NF4(nested=True))
    assert set(state) - {"_extra_state"} == set(parameters)
    assert {name for name, each in parameters.items() if each.requires_grad} == {"lora_A", "lora_B"}
    assert layer.compute_dtype is layer.lora_A.dtype is layer.bias.dtype is torch.bfloat16
    assert isinstance(layer.frozen_weight, Stored)
    assert layer.frozen_weight.shape == (33, 65)
    assert f"base={form.name}" in repr(layer)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_plain_layer_has_no_new_names(use_dora):
    layer = LoRALinear.from_linear(linear(), 3, 5.0, use_dora=use_dora)
    more = {"lora_magnitude_vector"} if use_dora else set()
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "_extra_state"} | more
    assert layer.base is None
    assert layer.frozen_weight is layer.weight
    assert layer.compute_dtype is torch.float32
    assert "base" not in repr(layer)


@pytest.mark.parametrize(("name", "form"), NAMED.items())
def test_names(name, form):
    assert LoRALinear.from_linear(linear(), 3, 5.0, base=name).base == form


@every_format
def test_factors_have_the_dtype_that_the_weight_had(form):
    for lora_dtype in (None, torch.float32):
        layer = trained(form, dtype=torch.bfloat16, lora_dtype=lora_dtype)
        assert {layer.lora_A.dtype, layer.lora_B.dtype} == {lora_dtype or torch.bfloat16}
        assert layer(torch.randn(4, 65, dtype=torch.bfloat16)).dtype is torch.bfloat16


@every_format
def test_a_new_dora_layer_computes_what_its_weight_stands_for(form):
    """Its magnitudes are the norms of W after quantisation: the gain of each row is 1."""
    plain = linear()
    W, bias = dequantise(form.quantise(plain.weight)), plain.bias.detach().clone()
    layer = LoRALinear.from_linear(plain, 3, 5.0, base=form, use_dora=True)
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), W.norm(dim=1))
    x = torch.randn(9, 65)
    torch.testing.assert_close(layer(x).detach(), x @ W.T + bias)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_magnitude_vector.mul_(1.5)
    V = W + 5 / 3 * layer.lora_B @ layer.lora_A
    wanted = 1.5 * (W.norm(dim=1) / V.norm(dim=1))[:, None] * V
    torch.testing.assert_close(layer(x).detach(), (x @ wanted.T + bias).detach())
    torch.testing.assert_close(layer.to_linear().weight.detach(), wanted.detach())


@every_format
def test_the_gradient_of_two_layers_reaches_the_first(form):
    """transformers 46736: it was lost above a quantised layer."""
    model = net(form)
    x = torch.randn(20, 70)
    model(x).square().sum().backward()
    W = {name: dequantise(layer.frozen_weight) for name, layer in model.named_children()}
    factors = {name: [each.detach().requires_grad_() for each in (layer.lora_A, layer.lora_B)]
               for name, layer in model.named_children()}  # fmt: skip

    def through(name, x):
        A, B = factors[name]
        return x @ (W[name] + 5 / 3 * B @ A).T + getattr(model, name).bias

    through("second", torch.relu(through("first", x))).square().sum().backward()
    for name, (A, B) in factors.items():
        torch.testing.assert_close(getattr(model, name).lora_A.grad, A.grad, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(getattr(model, name).lora_B.grad, B.grad, rtol=1e-4, atol=1e-3)
    assert model.first.lora_A.grad.abs().max() > 0


@pytest.mark.parametrize("form", [FP8("rows"), FP8("tensor"), INT8()], ids=str)
def test_every_scale_counts(form):
    """mcore-bridge 183: a scale was ignored."""
    layer, x = trained(form), torch.randn(5, 65)
    before = layer._plainly(x) - layer.bias
    with torch.no_grad():
        layer.weight_scale.mul_(4)
    torch.testing.assert_close(layer._plainly(x) - layer.bias, 4 * before)


@pytest.mark.parametrize(("K", "N"), [(192, 576), (576, 192), (1000, 129)])
def test_blocks_of_a_size_that_divides_nothing(K, N):
    """axolotl 3486: the size of blocks was guessed from shapes."""
    weight = torch.randn(N, K)
    blocks = torch.rand(-(-N // 128), -(-K // 128)) * 100 + 0.01
    weight *= blocks.repeat_interleave(128, 0)[:N].repeat_interleave(128, 1)[:, :K]
    plain = linear(K, N)
    plain.weight.data = weight.clone()
    layer = LoRALinear.from_linear(plain, 3, 5.0, base=FP8("blocks"))
    assert layer.weight_scale.shape == blocks.shape
    error = (dequantise(layer.frozen_weight) - weight).abs() / blocks.repeat_interleave(128, 0)[:N].repeat_interleave(
        128, 1
    )[:, :K]
    assert error.max() < 0.5


@every_format
def test_without_an_update(form):
    layer, x = trained(form), torch.randn(5, 65)
    W = dequantise(layer.frozen_weight)
    torch.testing.assert_close(layer._plainly(x), x @ W.T + layer.bias)


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_to_linear(dtype, form):
    """unsloth-zoo 810: what was trained over, and the update, rounded once."""
    layer = trained(form, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    plain = layer.to_linear()
    W = dequantise(layer.frozen_weight).double()
    wanted = W + 5 / 3 * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    assert type(plain) is nn.Linear
    assert plain.weight.dtype is dtype
    assert plain.weight.requires_grad
    error = (plain.weight.detach().double() - wanted).abs().max() / wanted.abs().max()
    assert error < torch.finfo(dtype).eps
    assert torch.equal(plain.bias, layer.bias)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_tensor_parallelism_is_refused():
    with pytest.raises(NotImplementedError, match=r"weight must be in no format .* got nf4"):
        ColwiseLoRA()._apply(trained(NF4()), None)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@every_format
def test_compiled_whole(form):
    """One program, and one more for any count of tokens: none for each layer, count or value of the codes."""
    torch._dynamo.reset()
    layers = [trained(form) for _ in range(3)]
    model = nn.Sequential(*(nn.Sequential(layer, nn.Linear(33, 65)) for layer in layers))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in (5, 7, 9, 12):
        x = torch.randn(tokens, 65, requires_grad=True)
        found = []
        for each in (compiled, model):
            y = each(x)
            found.append((y.detach(), *torch.autograd.grad(y.square().sum(), [x, layers[0].lora_A])))
        torch.testing.assert_close(*found)
        with torch.no_grad():
            layers[1].weight_scale.copy_(layers[1].weight_scale)
    assert counter.frame_count <= 2


# a model


@every_format
def test_replace_linear(form):
    plain, wanted = net(None), net(None)
    x = torch.randn(6, 70)
    for layer in wanted.children():
        layer.weight.data = dequantise(form.quantise(layer.weight))
    model = net(form)
    torch.testing.assert_close(model(x), wanted(x))
    assert not torch.equal(model(x), plain(x))
    assert {layer.base for layer in model.children()} == {form}


def test_the_report_and_explain_name_the_format():
    model = nn.Sequential(linear(), linear(33, 20))
    report = replace_linear(model, 3, 5.0, target_modules=["0"], base="nf4")
    assert report.base == "nf4"
    assert "frozen weights are in nf4" in str(report)
    replace_linear(model, 3, 5.0)
    said = str(explain(model, tokens=7))
    assert said.count("the frozen weight in nf4") == 1
    assert explain(model[0], tokens=7).base == "nf4"
    assert explain(model[1], tokens=7).base is None
    assert explain(model[0], tokens=7).dtype is torch.float32
    for_a_card = explain(model[0], tokens=7, gpu="A100")
    assert (for_a_card.base, for_a_card.predicted, for_a_card.forward) == ("nf4", None, ())


@every_format
def test_a_weight_counts_as_its_matrix(form, capsys):
    plain = replace_linear(nn.Sequential(linear(), linear(33, 20)), 3, 5.0)
    model = nn.Sequential(linear(), linear(33, 20))
    report = replace_linear(model, 3, 5.0, base=form)
    assert (report.parameters, report.trainable, report.updates) == (plain.parameters, plain.trainable, plain.updates)
    print_trainable_parameters(model)
    assert f"all params: {plain.parameters:,d} " in capsys.readouterr().out


class Weights:
    """How many weights in full there are at most, while linears are quantised."""

    def __init__(self, model, monkeypatch):
        self.alive = [weakref.ref(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)]
        self.seen, real = [], FP8.quantise

        def quantise(form, weight):
            self.seen.append(sum(each() is not None for each in self.alive))
            return real(form, weight)

        monkeypatch.setattr(FP8, "quantise", quantise)


def test_two_copies_never_are_in_memory(monkeypatch):
    model = nn.Sequential(*(linear(40, 40) for _ in range(5)))
    gc.disable()
    try:
        weights = Weights(model, monkeypatch)
        replace_linear(model, 3, 5.0, base="fp8")
        assert weights.seen == [5, 4, 3, 2, 1]
        assert all(each() is None for each in weights.alive)
    finally:
        gc.enable()


def test_the_linear_lets_go_of_its_weight():
    plain = linear()
    weight, bias = weakref.ref(plain.weight), plain.bias
    layer = LoRALinear.from_linear(plain, 3, 5.0, base="int8")
    assert weight() is None
    assert plain.weight is None
    assert layer.bias is bias
    assert not bias.requires_grad


@pytest.mark.parametrize(("value", "error", "match"), [
    ("fp4", ValueError, "base must be one of fp8, int8, nf4, nf4-nested, .*'fp4'"),
    (4, TypeError, "base must be one of .*got 4"),
])  # fmt: skip
def test_a_base_that_there_is_not(value, error, match):
    model = nn.Sequential(linear())
    with pytest.raises(error, match=match):
        replace_linear(model, 3, 5.0, base=value)
    with pytest.raises(error, match=match):
        LoRALinear.from_linear(model[0], 3, 5.0, base=value)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


@every_format
@pytest.mark.parametrize(("spoil", "match"), [
    (lambda weight: weight[-1, -1].fill_(torch.nan), "finite to be quantised, got an infinity or a NaN"),
    (lambda weight: weight[0, 0].fill_(-torch.inf), "finite to be quantised"),
    (lambda weight: setattr(weight, "data", weight.double()), "float32 to be quantised, got torch.float64"),
])  # fmt: skip
def test_what_cannot_be_quantised_is_found_before_anything_changes(spoil, match, form):
    model = nn.Sequential(linear(), linear(33, 20))
    with torch.no_grad():
        spoil(model[1].weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=rf"1: linear\.weight must be .*{match}"):
        replace_linear(model, 3, 5.0, base=form)
    assert [type(each) for each in model] == [nn.Linear] * 2
    assert all(each.weight.requires_grad for each in model)
    after = model.state_dict()
    assert all(torch.equal(tensor.nan_to_num(), after[name].nan_to_num()) for name, tensor in state.items())


# groups and MLPs


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = linear(65, 96), linear(65, 96), linear(96, 40)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = linear(65, 33), linear(65, 20), linear(65, 20)

    def forward(self, x):
        return self.q(x).sum() + self.k(x).sum() * self.v(x).sum()


@every_format
def test_a_gated_mlp(form, as_one):
    model = nn.Sequential(GatedMLP())
    report = replace_linear(model, 3, 5.0, base=form)
    assert report.mlps == ["0"]
    x = torch.randn(9, 65)
    got = model(x)
    assert len(as_one) == 1
    mlp = model[0]
    torch.testing.assert_close(got, super(LoRAMLP, mlp).forward(x))
    assert len(as_one) == 1


@every_format
def test_a_group(form, groups):
    model = Attention()
    report = replace_linear(model, 3, 5.0, base=form)
    assert report.groups == [("q", "k", "v")]
    x = torch.randn(9, 65)
    got = model(x)
    assert groups == [3]
    torch.testing.assert_close(got, Attention.forward(model, x))


def test_layers_of_several_bases_are_together(groups):
    model = Attention()
    replace_linear(model, 3, 5.0, target_modules=["q"], base="nf4", fuse="off")
    replace_linear(model, 3, 5.0, target_modules=["k", "v"], base="fp8")
    model(torch.randn(9, 65))
    assert groups == [2]


@pytest.mark.gpu
@every_format
def test_on_another_card(form):
    """unsloth 6831: kernels ran on the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = trained(form, dtype=torch.bfloat16).to("cuda:1")
    x = torch.randn(9, 65, dtype=torch.bfloat16)
    with torch.cuda.device(0):
        y = layer(x.to("cuda:1"))
    W = dequantise(layer.frozen_weight).cpu() + 5 / 3 * layer.lora_B.float().cpu() @ layer.lora_A.float().cpu()
    wanted = x.float() @ W.T + layer.bias.float().cpu()
    assert (y.float().cpu() - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_every_format_is_here():
    assert {type(form) for form in FORMATS} == {type(form) for form in NAMED.values()}
    assert len(BASE) == 3
