"""torch.compile and fake tensors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fused_lora import LoRALinear, lora_linear
from fused_lora.ops import Part, lora_group, lora_mlp
from tests.ops.problem import DEVICES, SCALE, make_dy, make_inputs, run, seed_on

# Dynamo makes an instance of every autograd.Function that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
ops = torch.ops.fused_lora


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors(dtype, device):
    with FakeTensorMode():
        inputs = {
            "x": torch.empty(2, 3, 10, dtype=dtype, device=device, requires_grad=True),
            "weight": torch.empty(7, 10, dtype=dtype, device=device),
            "A": torch.empty(4, 10, device=device, requires_grad=True),
            "B": torch.empty(7, 4, device=device, requires_grad=True),
        }
        y = lora_linear(**inputs, scale=SCALE, p=0.5)
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, 7), dtype, device)
        y.sum().backward()
        for name in ("x", "A", "B"):
            grad = inputs[name].grad
            assert (grad.shape, grad.dtype) == (inputs[name].shape, inputs[name].dtype)


def test_meta_tensors():
    layer = LoRALinear(10, 7, 3, 2.0, device="meta")
    y = layer(torch.empty(2, 3, 10, device="meta"))
    assert (y.shape, y.device.type) == ((2, 3, 7), "meta")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled_is_eager(p, device):
    inputs = make_inputs((2, 11), 10, 7, 3, device)
    dy, seed = make_dy(inputs), seed_on(device)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    want = run(lora_linear, inputs, dy, scale=SCALE, p=p, seed=seed)
    got = run(compiled, inputs, dy, scale=SCALE, p=p, seed=seed)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32 tensor cores")
def test_inductor(device):
    inputs = make_inputs(11, 10, 7, 3, device)
    dy = make_dy(inputs)

    def twice(**inputs):
        return torch.nn.functional.silu(lora_linear(**inputs, scale=SCALE)) * 2

    want, got = run(twice, inputs, dy), run(torch.compile(twice, fullgraph=True), inputs, dy)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)


def trained_layer(device, **options):
    layer = LoRALinear(10, 7, 3, lora_alpha=2.0, device=device, **options)
    torch.nn.init.normal_(layer.lora_B)
    return layer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mark", ["automatic", "marked"])
def test_a_new_number_of_tokens_does_not_recompile(mark, device):
    layer = trained_layer(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    graphs = []
    for M in (5, 8, 13, 64, 3):
        x = torch.randn(M, 10, device=device, requires_grad=True)
        if mark == "marked":
            torch._dynamo.mark_dynamic(x, 0)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()
        graphs.append(counter.frame_count)
    # Automatic dynamic shapes compile once for the first M and once for any.
    assert graphs == ([1] * 5 if mark == "marked" else [1, 2, 2, 2, 2])


@pytest.mark.parametrize("device", DEVICES)
def test_a_new_scale_does_not_recompile(device):
    layer = trained_layer(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x = torch.randn(5, 10, device=device)
    results = []
    for alpha in (2.0, 4.0, 5.0, 32.0):
        layer.set_lora_alpha(alpha)
        results.append(compiled(x))
        torch.testing.assert_close(results[-1], layer(x))
    assert counter.frame_count == 1
    assert not torch.allclose(results[0], results[1])


@pytest.mark.parametrize("name", ["scale", "p"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_new_number_compiles(name, device):
    """From its second value on, Dynamo takes a float argument for a symbol."""
    inputs = make_inputs(5, 10, 7, 3, device)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    for value in (0.5, 0.7, 0.9, 0.2):
        options = {"scale": SCALE, "seed": seed_on(device)} | {name: value}
        torch.testing.assert_close(compiled(**inputs, **options), lora_linear(**inputs, **options))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_dropout_draws_anew(device):
    layer = trained_layer(device, lora_dropout=0.5).train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 10, device=device)
    assert not torch.equal(compiled(x), compiled(x))
    layer.eval()
    assert torch.equal(compiled(x), compiled(x))
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_checkpointing(device):
    layer = trained_layer(device)
    x = torch.randn(5, 10, device=device, requires_grad=True)

    def gradients(function):
        return torch.autograd.grad(function(x).square().sum(), [x, layer.lora_A, layer.lora_B])

    def checkpointed(x):
        return checkpoint(lambda x: torch.relu(layer(x)), x, use_reentrant=False)

    want = gradients(lambda x: torch.relu(layer(x)))
    got = gradients(torch.compile(checkpointed, fullgraph=True, backend="aot_eager"))
    for plain, recomputed in zip(want, got, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_under_autocast(device):
    layer = trained_layer(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 10, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = compiled(x)
        assert y.dtype is torch.bfloat16
        torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_merge(device):
    layer = trained_layer(device)
    x = torch.randn(5, 10, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def merged(x, weight, A, B, scale):
        ops.merge_(weight, A, B, scale)
        return x @ weight.T

    weight = layer.weight.detach().clone()
    y = merged(x, weight, layer.lora_A.detach(), layer.lora_B.detach(), layer.scale)
    torch.testing.assert_close(weight, layer.merge_().weight.detach())
    torch.testing.assert_close(y, x @ weight.T)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_whole_with_tensors_that_come_twice(device):
    """One seed, scale and weight for several parts: torch.compile wants each argument of a Function once."""
    x, weight, A, B = (make_inputs(5, 10, 10, 3, device)[name] for name in ("x", "weight", "A", "B"))
    scale, seed = torch.tensor(SCALE, device=device), seed_on(device)

    def gradients(function):
        return torch.autograd.grad(function(x, weight, A, B, scale).sin().sum(), [x, A, B])

    def group(x, weight, A, B, scale):
        return torch.cat(lora_group(x, [Part(weight, A, B, None, scale)] * 2, 0.3, seed))

    def mlp(x, weight, A, B, scale):
        return lora_mlp(x, *[Part(weight, A, B, None, scale)] * 3, p=0.3, seed=seed)

    for function in (group, mlp):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for got, want in zip(gradients(compiled), gradients(function), strict=True):
            torch.testing.assert_close(got, want)
