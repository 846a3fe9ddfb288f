"""Models that another library has quantised: taken as they are, or left alone with the reason."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fused_lora import LoRABank, LoRALinear, add_adapter, load_adapter, replace_linear, route, save_adapter
from fused_lora.formats import FP8, INT8, NF4, dequantise
from fused_lora.relora import ReLoRA
from tests.modules import foreign
from tests.modules.bases import bits
from tests.modules.foreign import TWINS, meant

every_twin = pytest.mark.parametrize("twin", TWINS.values(), ids=TWINS)
BASES = {
    "nf4": NF4(), "nested": NF4(nested=True), "int8": INT8(), "fp8 by blocks": FP8("blocks"),
    "fp8 by tensor": FP8("tensor"), "fp8 by rows": FP8("rows"),
}  # fmt: skip


def check(layer, linear, W):
    """A layer that stands for a linear of a weight W in float64: its output, dx, and an update beside it."""
    nn.init.normal_(layer.lora_B)
    assert type(layer.weight) is nn.Parameter
    assert layer.weight.data_ptr() == linear.weight.data_ptr()
    assert not any(each.requires_grad for name, each in layer.named_parameters() if "weight" in name)
    torch.testing.assert_close(dequantise(layer.frozen_weight).double(), W, rtol=1e-6, atol=1e-7)
    x = torch.randn(7, W.shape[1], requires_grad=True)
    A, B, bias = (each.detach().double() for each in (layer.lora_A, layer.lora_B, layer.bias))
    V = W + 5 / 3 * B @ A
    layer.float()
    y = layer(x)
    wanted = x.double() @ V.T + bias
    assert (y - wanted).abs().max() < 1e-5 * wanted.abs().max()
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    wanted = dy.double() @ V
    assert (dx - wanted).abs().max() < 1e-5 * wanted.abs().max()


@every_twin
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_taken_as_it_is(dtype, twin):
    linear = twin(65, 33, dtype)
    W, before = meant(linear), bits(linear.weight).clone()
    model = nn.Sequential(linear)
    report = replace_linear(model, 3, 5.0)
    assert report.replaced == ["0"]
    assert f"frozen weights are in {model[0].base.name}" in str(report)
    check(model[0], linear, W)
    assert torch.equal(bits(linear.weight), before)


@pytest.mark.parametrize("name", BASES)
def test_which_base_it_is(name):
    linear = TWINS[name](65, 33, torch.bfloat16)
    layer = LoRALinear.from_linear(linear, 3, 5.0)
    assert layer.base == BASES[name]
    assert layer.compute_dtype is layer.lora_A.dtype
    again = LoRALinear.from_linear(linear, 3, 5.0, base=BASES[name], lora_dtype=torch.float32)
    assert again.weight.data_ptr() == layer.weight.data_ptr()
    assert again.lora_A.dtype is torch.float32


def test_scales_that_can_only_be_powers_of_two():
    linear = TWINS["fp8 by blocks, powers"](65, 33, torch.bfloat16)
    assert LoRALinear.from_linear(linear, 3).base == FP8("blocks", powers=True)


def test_the_dtype_that_is_known():
    """bitsandbytes' 4 bits remember it; else the bias has it, or models of the kind."""
    assert LoRALinear.from_linear(foreign.four_bits(dtype=torch.bfloat16), 3).compute_dtype is torch.bfloat16
    for twin, default in ((foreign.int8, torch.float16), (foreign.fp8_of_rows, torch.bfloat16)):
        linear = twin()
        assert LoRALinear.from_linear(linear, 3).compute_dtype is torch.float32
        linear.bias = None
        assert LoRALinear.from_linear(linear, 3).compute_dtype is default


@every_twin
def test_nothing_is_quantised_anew(twin):
    model = nn.Sequential(twin(65, 33, torch.float32))
    linear = model[0]
    name = "int8" if LoRALinear.from_linear(linear, 3).base != INT8() else "nf4"
    with pytest.raises(ValueError, match=f"0: base must be None for a weight that is quantised already, got {name}"):
        replace_linear(model, 3, 5.0, base=name)
    assert model[0] is linear


def changed(make, change):
    linear = make()
    change(linear)
    return linear


def of_state(**values):
    return lambda linear: vars(linear.weight.quant_state).update(values)


def attribute(name, value):
    return lambda linear: setattr(linear, name, value)


def of_int8(**values):
    def change(linear):
        for name, value in values.items():
            setattr(linear.weight, name, value)

    return change


REFUSED = {
    "fp4": (foreign.four_bits, of_state(quant_type="fp4"), "its weight is in fp4, which is no format here"),
    "blocks of 128": (foreign.four_bits, of_state(blocksize=128), "its weight has blocks of 128, and 64 are read"),
    "other values": (foreign.four_bits, of_state(code=torch.linspace(-1, 1, 16)), "other values than nf4's"),
    "for a CPU": (foreign.four_bits, of_state(packing_format_for_cpu=True), "packed for a CPU"),
    "a cast absmax": (foreign.four_bits, of_state(absmax=torch.ones(34).half()), "its absmax is torch.float16"),
    "an absmax that is short": (foreign.four_bits, of_state(absmax=torch.ones(33)), r"its absmax is .* \(33,\) where"),
    "another shape": (foreign.four_bits, of_state(shape=(65, 33)), r"the shape \(65, 33\) where \(33, 65\)"),
    "a cast offset": (
        lambda: foreign.four_bits(nested=True), of_state(offset=torch.ones((), dtype=torch.bfloat16)),
        "its offset is torch.bfloat16",
    ),
    "4 bits to be": (foreign.four_bits, lambda linear: delattr(linear.weight, "quant_state"), "is not quantised yet"),
    "8 bits to be": (foreign.int8, of_int8(SCB=None), "is not quantised yet"),
    "8 bits at each call": (foreign.int8, of_int8(has_fp16_weights=True), "is kept in 16 bits"),
    "a cast SCB": (foreign.int8, of_int8(SCB=torch.ones(33).half()), "its SCB is torch.float16"),
    "blocks of another size": (
        lambda: foreign.fp8_of_blocks(size=(64, 128)), lambda linear: None, "blocks of 64 x 128, and 128 x 128",
    ),
    "blocks without a size": (
        foreign.fp8_of_blocks, lambda linear: delattr(linear, "block_size"), "nothing says the size of its blocks",
    ),
    "too few blocks": (
        foreign.fp8_of_blocks, attribute("weight_scale_inv", nn.Parameter(torch.ones(1, 3))),
        r"its weight_scale_inv is .* \(1, 3\) where .* \(2, 3\) is expected",
    ),
    "fp8 in full again": (
        foreign.fp8_of_blocks, attribute("weight", nn.Parameter(torch.ones(200, 300))), "its weight is torch.float32",
    ),
    "one scale of all columns": (
        foreign.fp8_of_rows, attribute("weight_scale", nn.Parameter(torch.ones(1, 65))),
        r"its weight_scale is .*\(1, 65\) where",
    ),
    "a hook": (foreign.int8, lambda linear: linear.register_forward_hook(lambda *_: None), "it has hooks"),
    "a forward": (foreign.four_bits, attribute("forward", lambda x: x), "its forward was replaced"),
    "more": (foreign.fp8_of_rows, attribute("lora", nn.ReLU()), "it holds lora"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "change", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_left_alone_and_why(make, change, reason):
    model = nn.Sequential(changed(make, change), nn.Linear(4, 4))
    linear = model[0]
    report = replace_linear(model, 3, 5.0)
    assert report.replaced == ["1"]
    assert model[0] is linear
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.skipped["0"])
    if "hook" not in reason and "replaced" not in reason and "holds" not in reason:
        with pytest.raises(NotImplementedError, match=f"linear cannot be replaced: .*{reason}"):
            LoRALinear.from_linear(linear, 3)


def test_shared_codes_are_left_alone():
    model = nn.Sequential(foreign.int8(33, 33), foreign.int8(33, 33))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="its weight is shared with 1"):
        replace_linear(model, 3, 5.0)


def test_they_move_as_ours_do():
    """bitsandbytes 937 and 1971."""
    model = nn.Sequential(foreign.four_bits(nested=True))
    replace_linear(model, 3, 5.0)
    before = [bits(each).clone() for each in model[0].frozen_tensors()]
    twin = copy.deepcopy(model).half().to("cpu", torch.bfloat16)
    for own, was in zip(twin[0].frozen_tensors(), before, strict=True):
        assert torch.equal(bits(own), was)
    assert twin[0].weight_outer.dtype is torch.float32


@every_twin
def test_banks(twin):
    linear = twin(65, 33, torch.float32)
    W = meant(linear)
    model = nn.Sequential(linear)
    bias = linear.bias.detach().double()
    add_adapter(model, "one", r=3, lora_alpha=5.0, lora_dtype=torch.float32)
    bank = model[0]
    assert isinstance(bank, LoRABank)
    assert bank.base is not None
    A, B = bank.factors("one")
    nn.init.normal_(B)
    x = torch.randn(6, W.shape[1])
    with route(model, ["one", "__base__"], [4, 2]):
        y = model(x)
    wanted = x.double() @ W.T + bias
    wanted[:4] += 5 / 3 * x[:4].double() @ A.detach().double().T @ B.detach().double().T
    assert (y - wanted).abs().max() < 1e-5 * wanted.abs().max()
    with route(model, ["__base__"]):
        assert (model(x) - x.double() @ W.T - bias).abs().max() < 1e-5 * wanted.abs().max()


@every_twin
@pytest.mark.parametrize("banks", [False, True])
def test_an_adapter_from_a_file(banks, twin, tmp_path):
    made = nn.Sequential(twin(65, 33, torch.float32))
    replace_linear(made, 3, 5.0)
    nn.init.normal_(made[0].lora_B)
    save_adapter(made, tmp_path)
    model = nn.Sequential(twin(65, 33, torch.float32))
    if banks:
        add_adapter(model, "other", r=2, lora_alpha=3.0)
    load_adapter(model, tmp_path, "one" if banks else None)
    A, B = model[0].factors("one") if banks else (model[0].lora_A, model[0].lora_B)
    assert torch.equal(A.float(), made[0].lora_A.float())
    assert torch.equal(B.float(), made[0].lora_B.float())


def test_relora_leaves_them_alone():
    model = nn.Sequential(foreign.four_bits(), nn.ReLU())
    linear = model[0]
    with pytest.raises((ValueError, NotImplementedError), match=r"0\.weight is"):
        ReLoRA(model, torch.optim.AdamW([linear.bias]), reset_every=3, r=3)
    assert model[0] is linear


# the libraries themselves


@pytest.fixture(scope="module")
def bitsandbytes():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # it asks for kernels where it is imported
    return pytest.importorskip("bitsandbytes")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("K", "N"), [(65, 33), (576, 192), (1000, 130)])
def test_bitsandbytes_in_4_bits(K, N, nested, dtype, bitsandbytes):
    linear = bitsandbytes.nn.Linear4bit(K, N, compress_statistics=nested, quant_type="nf4")
    linear.weight.data = linear.weight.data.to(dtype)
    assert "not quantised yet" in replace_linear(nn.Sequential(linear, nn.Linear(2, 2)), 1, 2.0).skipped["0"]
    linear = linear.to("cpu")
    W = bitsandbytes.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    layer = LoRALinear.from_linear(linear, 3, 5.0)
    assert (layer.base, layer.compute_dtype) == (NF4(nested), dtype)
    assert torch.equal(dequantise(layer.frozen_weight, dtype), W)
    check(layer, linear, dequantise(layer.frozen_weight).double())


@pytest.mark.filterwarnings("default")
def test_bitsandbytes_in_8_bits(bitsandbytes):
    linear = bitsandbytes.nn.Linear8bitLt(65, 33, has_fp16_weights=False)
    linear = linear.to("cpu")
    W = linear.weight.data.double() * linear.weight.SCB.double()[:, None] / 127
    model = nn.Sequential(linear)
    replace_linear(model, 3, 5.0)
    check(model[0], linear, W)


@pytest.mark.filterwarnings("default")
def test_bitsandbytes_in_another_type(bitsandbytes):
    linear = bitsandbytes.nn.Linear4bit(65, 33, quant_type="fp4").to("cpu")
    with pytest.raises(NotImplementedError, match="its weight is in fp4"):
        LoRALinear.from_linear(linear, 3)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("size", [None, (128, 128)])
def test_transformers_fp8(size):
    FP8Linear = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear
    linear = FP8Linear(300, 200, block_size=size, has_bias=True)
    twin = foreign.fp8_of_blocks(size=size)
    linear.weight.data, linear.weight_scale_inv.data = twin.weight.data, twin.weight_scale_inv.data
    nn.init.normal_(linear.bias)
    model = nn.Sequential(linear)
    replace_linear(model, 3, 5.0)
    check(model[0], linear, meant(twin))


def test_what_says_nothing_of_a_format_is_left_alone():
    linear = foreign.FP8Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn))
    linear.notes = SimpleNamespace()
    with pytest.raises(ValueError, match=r"a subclass of nn\.Linear"):
        replace_linear(nn.Sequential(linear), 3, 5.0)
