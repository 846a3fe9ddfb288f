"""Forward and backward of the Triton kernels against float64, on the GPU or in the interpreter."""

import pytest
import torch

from fused_lora.kernels.tiles import Gpu
from tests.accuracy import assert_accurate
from tests.kernels.problem import DEVICE, RESULTS, Problem, gpus
from tests.ops.layouts import BIAS_LAYOUTS
from tests.ops.problem import make_dy, make_inputs, solve

pytestmark = pytest.mark.interpreter

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATHS = [pytest.param(gpu, id=name) for name, gpu in gpus().items()]
# (M, K, N, r): aligned; odd everything; one row; one column; r beyond a block; more tiles than programs of a small GPU.
SHAPES = [
    (96, 128, 192, 16),
    (77, 101, 75, 5),
    (1, 64, 40, 8),
    (65, 72, 1, 1),
    (50, 505, 136, 24),
    (130, 64, 300, 100),
    (40, 48, 64, 272),
    (300, 40, 520, 8),
]


def check(problem: Problem, gpu: Gpu, needs=(True, True, True)):
    got, exact, unfused = problem.kernels(gpu, needs=needs), problem.exact(), problem.torch()
    for name, needed in zip(RESULTS, (True, *needs), strict=True):
        if needed:
            assert_accurate(name, got[name], exact[name], unfused[name])
        else:
            assert got[name] is None
    return got


@pytest.mark.parametrize("gpu", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, gpu):
    got = check(Problem.random(*shape, dtype), gpu)
    assert all(result.dtype is dtype for result in got.values())


@pytest.mark.parametrize("gpu", PATHS)
@pytest.mark.parametrize("shape", [(96, 128, 192, 16), (77, 101, 75, 5)], ids=str)
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout(shape, p, gpu):
    check(Problem.random(*shape, torch.float16, p=p), gpu)


@pytest.mark.parametrize("gpu", PATHS)
def test_fp32_factors_over_a_16_bit_base(gpu):
    problem = Problem.random(96, 128, 192, 16, torch.bfloat16, lora_dtype=torch.float32)
    got = check(problem, gpu)
    assert (got["y"].dtype, got["dx"].dtype) == (torch.bfloat16, torch.bfloat16)
    assert (got["dA"].dtype, got["dB"].dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("gpu", PATHS)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_what_is_needed(needs, gpu):
    check(Problem.random(60, 64, 72, 8, torch.float16), gpu, needs)


def _layouts(matrix):
    """The same values behind other strides and base offsets; padding holds NaN."""
    M, K = matrix.shape
    nan = torch.full((), float("nan"), dtype=matrix.dtype, device=matrix.device)
    padded = nan.repeat(M + 2, K + 16)
    for name, view in {
        "row slice": padded[1 : M + 1, 8 : K + 8],
        "odd offset": padded.flatten()[3 : 3 + M * (K + 9)].view(M, K + 9)[:, :K],
        "every other row": nan.repeat(2 * M, K)[::2],
        "every other column": nan.repeat(M, 2 * K)[:, ::2],
        "transposed": nan.repeat(K, M).T,
    }.items():
        view.copy_(matrix)
        yield name, view


@pytest.mark.parametrize("gpu", PATHS)
@pytest.mark.parametrize("argument", ["x", "dy", "weight"])
def test_strides_and_offsets(argument, gpu):
    """NaN in the padding of a view never reaches a result."""
    problem = Problem.random(70, 64, 136, 16, torch.float16)
    exact, unfused = problem.exact(), problem.torch()
    original = getattr(problem, argument)
    for layout, view in _layouts(original):
        setattr(problem, argument, view)
        got = problem.kernels(gpu)
        for name in RESULTS:
            assert_accurate(f"{name} with {argument} as {layout}", got[name], exact[name], unfused[name])


@pytest.mark.parametrize("gpu", PATHS)
def test_broadcast_dy(gpu):
    """y.sum() hands its backward a dy of stride 0."""
    problem = Problem.random(70, 64, 136, 16, torch.float16)
    problem.dy = torch.ones((), dtype=torch.float16, device=DEVICE).expand(70, 136)
    check(problem, gpu)


@pytest.mark.parametrize("gpu", PATHS)
@pytest.mark.parametrize("width", [*range(505, 513), 5461 // 8])
def test_widths_around_a_tma_boundary(width, gpu):
    check(Problem.random(33, width, width + 3, 16, torch.float16), gpu)


@pytest.mark.parametrize("gpu", PATHS)
@pytest.mark.parametrize("depth", [1, 8, 16, 24, 40])
@pytest.mark.parametrize("r", [8, 32])
def test_reductions_shorter_than_a_step(depth, r, gpu):
    """No NaN out of what a single, partly filled step leaves unread: K and N this small, with wide outputs beside."""
    check(Problem.random(60, depth, 264, r, torch.float16), gpu)
    check(Problem.random(60, 264, depth, r, torch.float16), gpu)


@pytest.mark.parametrize("gpu", PATHS)
def test_same_inputs_same_bits(gpu):
    problem = Problem.random(300, 264, 136, 24, torch.float16, p=0.1)
    first, second = problem.kernels(gpu), problem.kernels(gpu)
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)


@pytest.mark.parametrize("gpu", PATHS)
def test_inputs_are_left_alone(gpu):
    problem = Problem.random(64, 64, 72, 8, torch.float16)
    names = ("x", "weight", "A", "B", "bias", "dy")
    before = {name: getattr(problem, name).clone() for name in names}
    problem.kernels(gpu)
    assert all(torch.equal(before[name], getattr(problem, name)) for name in names)


@pytest.mark.parametrize("gpu", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poisoned_outputs(dtype, gpu, monkeypatch):
    """Every element of every output and workspace is written: memory that starts as NaN leaves none."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    def poisoned_like(self, *size, dtype=None, device=None):
        return poisoned(*size, dtype=dtype or self.dtype, device=device or self.device)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_like)
    for shape in [(77, 101, 75, 5), (257, 136, 264, 16)]:
        check(Problem.random(*shape, dtype), gpu)


@pytest.mark.parametrize("layout", list(BIAS_LAYOUTS))
def test_a_bias_that_is_no_dense_vector(layout):
    """Through the op, which prepares it for the kernel."""
    inputs = make_inputs(26, 40, 32, 4, DEVICE)
    inputs["bias"] = BIAS_LAYOUTS[layout](inputs["bias"].detach())
    solve(inputs, make_dy(inputs))
