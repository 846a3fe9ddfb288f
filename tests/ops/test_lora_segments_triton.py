"""Triton's kernels for rows with adapters of their own, on a GPU or in the interpreter, against float64."""

import pytest
import torch

from fused_lora import backends
from tests.kernels.problem import DEVICE
from tests.ops.segments_problem import Problem, check, check_graph
from tests.segments.divisions import DIVISIONS, Division

pytestmark = pytest.mark.interpreter
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _triton():
    with backends.forcing("triton"):
        yield


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """What is allocated holds NaN where it is not written."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def of_triton(name, *args, **kwargs):
    return check(Problem(DIVISIONS[name], *args, **kwargs, backend="triton"), times=1)


@pytest.mark.parametrize(
    "name",
    ["one", "two of one window", "odd", "one adapter in three segments", "without adapters in between", "rows behind",
     "empty ones", "sums of two", "a tree", "ranks 1 to 9"],
)  # fmt: skip
def test_divisions(name):
    of_triton(name, 72, (56,))


@pytest.mark.parametrize("name", ["mixed", "the largest", "not in the slab's order"])
def test_large_places(name):
    of_triton(name, 40, (33,))


@pytest.mark.parametrize(("name", "dtype", "lora_dtype", "scale"), [
    ("odd", FP16, None, 1.0), ("odd", FP16, None, 300.0), ("odd", BF16, FP32, 1.0), ("odd", FP32, None, 1.0),
    ("sums of two", FP16, FP32, 300.0),
])  # fmt: skip
def test_dtypes(name, dtype, lora_dtype, scale):
    of_triton(name, 40, (33, 24) if dtype is BF16 else (24,), dtype, lora_dtype, scale)


@pytest.mark.parametrize(("name", "dtype"), [("odd", BF16), ("sums of two", BF16), ("a tree", FP16), ("odd", FP32)])
def test_dropout(name, dtype):
    """Adapters by p of their own, on levels with masks of their own."""
    of_triton(name, 72, (40,), dtype, drops=True)


@pytest.mark.parametrize(("K", "N"), [(8, 8), (100, 72), (63, 65), (24, 300)])
def test_sizes(K, N):
    of_triton("odd", K, (N,))


def test_more_slices_than_one():
    """Of a window's rows."""
    check(Problem(Division((16, 16), ((0, 1100), (1, 3))), 16, (24,), backend="triton"), times=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_in_rows_without_an_adapter_stays_there(value):
    problem = Problem(DIVISIONS["rows behind"], 40, (32,), backend="triton")
    with torch.no_grad():
        problem.x[150:] = value
    problem.dys[0][150:] = value
    y, dx, _, *grads = problem.run()
    assert y[:130].isfinite().all()
    assert dx[:130].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def test_rows_without_adapters_are_the_bases_bit_for_bit():
    division = DIVISIONS["without adapters in between"]
    problem = Problem(division, 40, (32,), backend="triton")
    base = Problem(Division((16,) * 3, ((None, division.M), (0, 0))), 40, (32,), backend="triton")
    base.x, base.dys = problem.x, problem.dys
    for name in ("weight", "bias"):
        setattr(base.linears[0], name, getattr(problem.linears[0], name))
    (y, dx, *_), (base_y, base_dx, *_) = problem.run(), base.run()
    rows = torch.tensor([not own for own in division.adapters], device=DEVICE)
    assert torch.equal(y[rows], base_y[rows])
    assert torch.equal(dx[rows], base_dx[rows])


def test_x_and_dy_of_any_strides():
    problem = Problem(DIVISIONS["odd"], 40, (24,), backend="triton")
    for number in range(2):
        padded = torch.full((problem.x.shape[0], 2, 51), float("nan"), dtype=BF16, device=DEVICE)
        of = problem.dys[0] if number else problem.x.detach()
        view = padded[:, 1, 3 : 3 + of.shape[1]]
        view.copy_(of)
        if number:
            problem.dys[0] = view
        else:
            problem.x = view.requires_grad_()
        check(problem, times=0)


@pytest.mark.gpu
def test_one_graph_replays_any_division():
    check_graph("triton")


@pytest.mark.gpu
def test_many_rows():
    """More tiles than a wave has, windows of uneven rows, and sums of several slices."""
    check(Problem(Division((16,) * 8, tuple(enumerate((4000, 1999, 1001, 500, 300, 192, 100, 100)))), 1024, (768,),
                  backend="triton"))  # fmt: skip
    check(Problem(Division((16,) * 64, tuple((i, 128) for i in range(64))), 512, (1032,), backend="triton"))
    check(
        Problem(Division((8, 128, 64), ((0, 3000), (1, 2000), (2, 3000))), 1024, (512,), backend="triton", drops=True)
    )
