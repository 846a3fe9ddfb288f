"""csrc beyond 2^31 elements, and beyond its first block of flags."""

import math

import pytest
import torch

from fused_lora import lora_linear
from fused_lora.reference import lora_linear_ref
from tests.ops import test_lora_mlp
from tests.ops.problem import SCALE, cast, check, make_dy, make_inputs, run
from tests.ops.test_lora_linear_cuda import assert_same, capture

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper", "_memory"), pytest.mark.timeout(900)]
BF16 = torch.bfloat16
MOST_INT = 2**31
BLOCK_INTS = 2**20  # of flags: kBlockInts in flags.cpp


@pytest.fixture
def _memory():
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of device memory")
    yield
    torch.cuda.empty_cache()


def far_apart(matrix):
    """Its values in rows of which the last one starts beyond 2^31 elements."""
    spacing = (MOST_INT // (len(matrix) - 1) // 8 + 1) * 8  # that the copy engine can address
    buffer = torch.empty(spacing * len(matrix), dtype=matrix.dtype, device=matrix.device)
    view = buffer.as_strided(matrix.shape, (spacing, 1)).copy_(matrix.detach())
    assert view.stride(0) * (len(view) - 1) >= MOST_INT
    return view.requires_grad_(matrix.requires_grad)


@pytest.mark.parametrize("name", ["x", "weight", "A", "B", "dy"])
def test_rows_far_apart(name):
    inputs = make_inputs(4200, 264, 1032, 24, "cuda", BF16)
    tensors = inputs | {"dy": make_dy(inputs)}
    dy = tensors["dy"]
    tensors[name] = far_apart(tensors[name])
    got = run(lora_linear, {key: tensors[key] for key in inputs}, tensors["dy"], scale=SCALE)
    check(got, inputs, dy)


@pytest.mark.parametrize("name", ["x", "dy", "gate", "up", "down"])
def test_rows_of_an_mlp_far_apart(name):
    x, parts = test_lora_mlp.make_mlp(4200, 264, 1032, 392, (24, 16, 8), "cuda", BF16)
    dy = torch.randn(4200, 392, device="cuda", dtype=BF16)
    far = {"x": x, "dy": dy} | {of: part["weight"] for of, part in zip(test_lora_mlp.NAMES, parts, strict=True)}
    far[name] = far_apart(far[name])
    far_parts = [part | {"weight": far[of]} for of, part in zip(test_lora_mlp.NAMES, parts, strict=True)]
    got = test_lora_mlp.results(test_lora_mlp.fused, far["x"], far_parts, far["dy"], "silu")
    test_lora_mlp.check(got, x, parts, dy, "silu")


def trained(parts):
    return [tensor for part in parts for tensor in part.values() if tensor.requires_grad]


def gradients(function, x, parts, dy):
    """y, dx, and the gradient of each tensor of the parts that requires one."""
    y = function(x, parts)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained(parts)], dy)]


def assert_near(got, exact):
    """What was read or written elsewhere is off by as much as the values are."""
    assert (got.double() - exact).abs().max() < 0.02 * exact.abs().max()


def check_by_rows(fused, by_formula, x, parts, dy, at_once):
    """Against float64, so many rows at a time. A sum without one of 500 slices of tokens would be off by 4 per cent."""
    y, dx, *sums = gradients(fused, x, parts, dy)
    wide, exact_sums = [cast(part, torch.float64) for part in parts], [0] * len(sums)
    chunks = zip(*(tensor.split(at_once) for tensor in (x.detach(), dy, y, dx)), strict=True)
    for own_x, own_dy, own_y, own_dx in chunks:
        own_x = own_x.double().requires_grad_()
        exact_y, exact_dx, *more = gradients(by_formula, own_x, wide, own_dy.double())
        assert_near(own_y, exact_y)
        assert_near(own_dx, exact_dx)
        exact_sums = [total + own for total, own in zip(exact_sums, more, strict=True)]
    for got, exact in zip(sums, exact_sums, strict=True):
        assert (got.double() - exact).norm() < 0.02 * exact.norm()


def check_linear(M, K, N, r, at_once):
    inputs = make_inputs(1, K, N, r, "cuda", BF16)
    part = {name: tensor for name, tensor in inputs.items() if name != "x"}
    x, dy = (torch.randn(M, cols, device="cuda", dtype=BF16) for cols in (K, N))
    check_by_rows(
        lambda x, parts: lora_linear(x, **parts[0], scale=SCALE),
        lambda x, parts: lora_linear_ref(x, **parts[0], scale=SCALE),
        x.requires_grad_(), [part], dy, at_once,
    )  # fmt: skip


# Through the copy engine, and through the finisher.
@pytest.mark.parametrize("width", [8192, 8191])
def test_activations_of_more_elements(width):
    M = MOST_INT // width + 300
    assert M * width > MOST_INT
    check_linear(M, width, width, 16, 4096)


@pytest.mark.parametrize("save", ["all", "less"])
def test_hidden_activations_of_more_elements(save):
    M, width = MOST_INT // 8192 + 300, 512
    _, parts = test_lora_mlp.make_mlp(1, width, 8192, width, (16, 8, 24), "cuda", BF16)
    x, dy = (torch.randn(M, width, device="cuda", dtype=BF16) for _ in range(2))
    by_formula = test_lora_mlp.by_formula(lora_linear_ref)
    check_by_rows(
        lambda x, parts: test_lora_mlp.fused(x, parts, "silu", save=save),
        lambda x, parts: by_formula(x, parts, "silu"),
        x.requires_grad_(), parts, dy, 4096,
    )  # fmt: skip


def low_flags(M):
    return 2 * math.ceil(M / 256)


def test_a_launch_with_more_flags_than_a_block():
    M = 128 * BLOCK_INTS + 1000
    assert low_flags(M) > BLOCK_INTS
    check_linear(M, 8, 8, 24, 2**21)
    check_linear(3000, 264, 520, 24, 3000)  # with the same stream's flags
    with torch.cuda.stream(torch.cuda.Stream()):  # with others
        check_linear(3000, 264, 520, 24, 3000)
    torch.cuda.synchronize()


def test_captured_launches_with_more_flags_than_a_block():
    """Flags that a capture takes are its own for good, and new blocks come while it goes on."""
    M, times = 2**20, 70
    assert 2 * times * low_flags(M) > BLOCK_INTS
    check_linear(M, 8, 8, 24, M)
    inputs, scale = make_inputs(M, 8, 8, 24, "cuda", BF16), torch.tensor(SCALE, device="cuda")
    dy = make_dy(inputs)
    want = run(lora_linear, inputs, dy, scale=scale)
    graph, results = capture(lambda: [run(lora_linear, inputs, dy, scale=scale) for _ in range(times)])
    for _ in range(3):
        for got in results:
            for value in got.values():
                value.fill_(float("nan"))
        graph.replay()
        for got in results:
            assert_same(got, want)
