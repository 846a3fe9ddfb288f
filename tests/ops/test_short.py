"""The short way gives what the long way gives, whoever calls, and finds what is wrong with a call as it does."""

import pytest
import torch

from fused_lora import LoRALinear, backends, lora_linear
from fused_lora.ops import short
from fused_lora.recent import Recent
from tests.ops.problem import SCALE, make_dy, make_inputs, run, seed_on

pytestmark = pytest.mark.gpu
SHAPE = ((5, 60), 264, 136, 16)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(params=["triton", "addmm", "cuda"])
def backend(request):
    if request.param == "cuda" and (not backends.has_extension() or backends.eager_extension() is not None):
        pytest.skip("csrc has its own short way, or none: FUSED_LORA_ABI=stable has this one")
    with backends.forcing(request.param):
        yield request.param


@pytest.fixture
def _in_float32(backend):
    if backend == "cuda":
        pytest.skip("csrc has no float32")


@pytest.fixture
def looked_at(monkeypatch):
    recent = Recent(64)
    monkeypatch.setattr(short, "_looked_at", recent)
    return recent


def problem(dtype=torch.bfloat16, bias=True, **options):
    inputs = make_inputs(*SHAPE, "cuda", dtype, bias=bias, **options)
    if bias:
        inputs["bias"].requires_grad_(False)
    return inputs, make_dy(inputs)


def scale():
    return torch.tensor(SCALE, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_it_gives_the_long_ways_bits(backend, dtype, p, looked_at, monkeypatch):
    if backend == "cuda" and dtype is torch.float32:
        pytest.skip("csrc has no float32")
    options = {"scale": scale(), "p": p, "seed": seed_on("cuda") if p else None}
    for _ in range(4):
        inputs, dy = problem(dtype)
        got = run(lora_linear, inputs, dy, **options)
        with monkeypatch.context() as patch:
            patch.setattr(short, "lora_linear", lambda *_: None)
            want = run(lora_linear, inputs, dy, **options)
        for name, value in want.items():
            assert torch.equal(got[name], value), name
    assert list(looked_at.young.values()) == [backend]


def test_without_gradients(backend, looked_at):
    inputs, _ = problem()
    with torch.no_grad():
        ys = [lora_linear(**inputs, scale=scale()) for _ in range(4)]
    assert not ys[0].requires_grad
    assert all(torch.equal(y, ys[0]) for y in ys)
    assert ys[0].shape == (*SHAPE[0], SHAPE[2])
    ys[0].add_(1)  # no view
    assert list(looked_at.young.values()) == [backend]


@pytest.mark.parametrize("needs", [("x",), ("A",), ("B",), ("A", "B")])
def test_some_gradients(backend, needs):
    for _ in range(3):
        inputs, dy = problem()
        want = run(lora_linear, inputs, dy, scale=scale())
        for name in ("x", "A", "B"):
            inputs[name].requires_grad_(name in needs)
        got = run(lora_linear, inputs, dy, scale=scale())
        assert set(got) == {"y", *(f"d{name}" for name in needs)}
        for name in got:
            torch.testing.assert_close(got[name], want[name], rtol=2e-2, atol=2e-2)


def test_errors_are_found_after_a_good_call(backend):
    inputs, _ = problem()
    lora_linear(**inputs, scale=scale())
    wrong = {
        "x must have": {"x": inputs["x"][..., :-1]},
        "weight must be frozen": {"weight": inputs["weight"].clone().requires_grad_()},
        "A must have shape": {"A": inputs["A"][:, :-1]},
        "bias must have shape": {"bias": inputs["bias"][:-1]},
        "x must be on": {"x": inputs["x"].cpu()},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            lora_linear(**{**inputs, **change}, scale=scale())
    with pytest.raises(ValueError, match="p must be between"):
        lora_linear(**inputs, scale=scale(), p=1.5)


@pytest.mark.usefixtures("_in_float32")
def test_second_derivatives(backend):
    inputs, _dy = problem(torch.float32)
    x = inputs["x"]
    y = lora_linear(**inputs, scale=scale())
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (again,) = torch.autograd.grad(dx.sum(), x)
    W = (inputs["weight"] + SCALE * inputs["B"] @ inputs["A"]).double()
    want = 2 * torch.ones_like(x).double() @ W.T @ W
    assert ((again.double() - want).norm() / want.norm()).item() < 1e-3


@pytest.mark.usefixtures("_in_float32")
def test_autocast_in_the_backward_pass_changes_nothing(backend):
    inputs, dy = problem(torch.float32)
    want = run(lora_linear, inputs, dy, scale=scale())
    y = lora_linear(**inputs, scale=scale())
    with torch.autocast("cuda", torch.bfloat16):
        dA, dB = torch.autograd.grad(y, [inputs["A"], inputs["B"]], dy)
    assert torch.equal(dA, want["dA"])
    assert torch.equal(dB, want["dB"])


@pytest.mark.usefixtures("_in_float32")
def test_negated_views_are_read_as_what_they_are(backend):
    inputs, dy = problem(torch.float32)
    x = torch.complex(torch.zeros_like(inputs["x"]), inputs["x"]).detach().conj().imag
    assert x.is_neg()
    for _ in range(3):
        got = run(lora_linear, inputs | {"x": x.requires_grad_()}, dy, scale=scale())
        want = run(lora_linear, inputs | {"x": x.detach().resolve_neg().requires_grad_()}, dy, scale=scale())
        for name in want:
            torch.testing.assert_close(got[name], want[name])


@pytest.mark.usefixtures("_in_float32")
def test_a_negated_gradient_is_read_as_what_it_is(backend):
    inputs, dy = problem(torch.float32)
    want = run(lora_linear, inputs, dy, scale=scale())
    negated = torch.complex(torch.zeros_like(dy), -dy).conj().imag
    assert negated.is_neg()
    for _ in range(3):
        for name, value in run(lora_linear, inputs, negated, scale=scale()).items():
            torch.testing.assert_close(value, want[name])


def test_no_gradient_is_none(backend):
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    inputs, _ = problem()
    Nothing.apply(lora_linear(**inputs, scale=scale())).sum().backward()
    assert inputs["A"].grad is None


def test_the_seed_is_drawn_anew(backend):
    inputs, _ = problem()
    with torch.no_grad():
        ys = [lora_linear(**inputs, scale=scale(), p=0.5) for _ in range(4)]
    assert not any(torch.equal(ys[0], y) for y in ys[1:])


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_who_watches_sees_ops(backend):
    layer = LoRALinear(264, 136, r=16, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(60, 264, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for _ in range(3):
        layer(x).sum().backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x).sum().backward()
    assert "fused_lora::lora_parts_forward" in {event.key for event in profile.key_averages()}


def test_versions_of_the_environment_are_seen(looked_at):
    """Another backend from one call to the next."""
    inputs, _ = problem()
    for name in ("triton", "addmm", "triton"):
        with backends.forcing(name):
            lora_linear(**inputs, scale=scale())
    assert sorted(looked_at.young.values()) == ["addmm", "triton"]
