"""Eager calls with autograd in C++ (csrc/torch/eager_calls.cpp): how arguments are read, and who sees the passes."""

import gc

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import backends, lora_linear
from tests.ops.problem import SCALE, make_dy, make_inputs, run

pytestmark = pytest.mark.gpu
SHAPE = (60, 264, 136, 16)


@pytest.fixture(autouse=True)
def module():
    found = backends.eager_extension()
    if found is None:
        pytest.skip("the CUDA extension is not built, or has no autograd")
    return found


@pytest.fixture
def problem():
    inputs = make_inputs(*SHAPE, "cuda", torch.bfloat16)
    return inputs, make_dy(inputs), torch.tensor(SCALE, device="cuda")


def in_order(inputs, scale):
    x, weight, A, B = (inputs[name] for name in ("x", "weight", "A", "B"))
    return x, weight, A, B, inputs.get("bias"), scale, None, 0.0, None


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **kwargs or {})


def test_a_function_mode_does_not_see_how_arguments_are_read(module, problem):
    inputs, _, scale = problem
    with Seen() as seen:
        y = module.lora_linear(*in_order(inputs, scale))
    assert y is not None
    assert seen.functions == []
    with Seen() as seen:
        torch.ones(2)
    assert len(seen.functions) == 1, "and is there again"


class Refuses(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"unknown: {function}")


def test_a_subclass_that_refuses_functions_is_not_asked(module, problem):
    inputs, _, scale = problem
    weight = inputs["weight"].as_subclass(Refuses)
    assert module.lora_linear(*in_order(inputs | {"weight": weight}, scale)) is not None


@pytest.mark.parametrize(("arguments", "error"), [
    ((), "9 arguments were expected, got 0"),
    ((1,) * 9, "a tensor was expected"),
])  # fmt: skip
def test_what_are_no_arguments(module, arguments, error):
    with pytest.raises(TypeError, match=error):
        module.lora_linear(*arguments)


def test_what_are_no_parts(module, problem):
    inputs, _, scale = problem
    x, weight, A, B, bias, *_ = in_order(inputs, scale)
    with pytest.raises(TypeError):
        module.lora_group(x, 5, None, 0.0)
    with pytest.raises(RuntimeError, match="parts must be flat, of 9 tensors each, got 2"):
        module.lora_group(x, [weight, A], None, 0.0)
    with pytest.raises(TypeError):
        module.lora_group(x, [weight, A, B, bias, scale, "seed", None, None, None], None, 0.0)


def test_nothing_is_kept(module, problem):
    inputs, dy, scale = problem
    run(lora_linear, inputs, dy, scale=scale)  # what lives on is made here

    def allocated_after_calls():
        for _ in range(20):
            module.lora_linear(*in_order(inputs, scale))
            x, *part = in_order(inputs, scale)[:6]
            module.lora_group(x, [*part, None, None, None, None] * 2, None, 0.0)
        gc.collect()
        return torch.cuda.memory_allocated()

    allocated_after_calls()  # autograd's thread frees what the backward pass held a moment after it
    before = allocated_after_calls()
    assert allocated_after_calls() == before


def test_memory_that_is_not_there_is_torchs_own_error(module, problem):
    inputs, _, scale = problem
    x = inputs["x"].detach()[:1].expand(2**30, -1)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"), torch.no_grad():
        lora_linear(**inputs | {"x": x}, scale=scale)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **kwargs or {})


def test_a_mode_around_the_backward_pass_sees_it(problem):
    inputs, dy, scale = problem
    want = run(lora_linear, inputs, dy, scale=scale)
    leaves = [inputs[name] for name in ("x", "A", "B")]
    y = lora_linear(**inputs, scale=scale)
    with Ops() as ops:
        grads = torch.autograd.grad(y, leaves, dy)
    assert "fused_lora::cuda_lora_parts_backward" in ops.names
    for name, grad in zip(("dx", "dA", "dB"), grads, strict=True):
        assert torch.equal(grad, want[name])


def test_a_negated_gradient_is_read_as_what_it_is(problem):
    inputs, dy, scale = problem
    leaves = [inputs[name] for name in ("x", "A", "B")]
    negated = torch._neg_view(dy)
    assert negated.is_neg()
    got = torch.autograd.grad(lora_linear(**inputs, scale=scale), leaves, negated)
    want = torch.autograd.grad(lora_linear(**inputs, scale=scale), leaves, -dy)
    assert all(map(torch.equal, got, want))


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_a_profile_has_both_passes_and_their_shapes(problem):
    inputs, dy, scale = problem
    with torch.profiler.profile(record_shapes=True) as profile:
        run(lora_linear, inputs, dy, scale=scale)
    M, K, N, r = SHAPE
    for name in ("cuda_lora_parts_forward", "cuda_lora_parts_backward"):
        (event,) = [event for event in profile.events() if event.name == f"fused_lora::{name}"]
        assert event.input_shapes == [[M, K], [N, K], [r, K], [N, r]]
