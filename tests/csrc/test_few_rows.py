"""Passes of few rows over large weights, which torch's products take: the same results from the same calls."""

import pytest
import torch

from fused_lora import backends, explain, lora_linear
from fused_lora.reference import lora_linear_ref
from tests.accuracy import assert_accurate
from tests.ops import test_lora_group, test_lora_mlp
from tests.ops.problem import cast, randn, unfused

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*Profiler clears events")]
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def _hopper():
    device = torch.device("cuda", 0)
    if backends.eager_extension() is None or backends.gpu(device).capability != 90:
        pytest.skip("the rule is of csrc/sm90")


def own_kernels(call) -> bool:
    """Whether a call launches kernels of this package."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return any("fused_lora" in event.key for event in profile.key_averages())


def check(M, K, sizes, bias=True, only_y=False):
    """Against float64, held to the unfused formula; y is rounded where the base product ends, once more than by it."""
    x, parts = test_lora_group.make_group(M, K, sizes, "cuda", DTYPE, bias)
    dys = [randn(M, N, device="cuda", dtype=DTYPE) for N, _ in sizes]
    got = test_lora_group.results(test_lora_group.grouped, x, parts, dys)
    wide = cast({"x": x}, torch.float64)["x"], [cast(part, torch.float64) for part in parts]
    exact = test_lora_group.results(test_lora_group.alone(lora_linear_ref), *wide, [dy.double() for dy in dys])
    by_torch = test_lora_group.results(test_lora_group.alone(unfused), x, parts, dys)
    for name in [name for name in got if name[0] == "y"] if only_y else got:
        assert_accurate(name, got[name], exact[name], by_torch[name], roundings=2)


@pytest.mark.parametrize("M", [1, 7, 64, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [12, 16])
def test_linears(M, bias, r):
    """Up to 64 rows kernels of their own take those of r that is a multiple of 8."""
    x, parts = test_lora_group.make_group(M, 14336, [(4008, r)], "cuda", DTYPE, bias)
    with torch.no_grad():
        assert own_kernels(lambda: lora_linear(x, **parts[0])) == (M <= 64 and r % 8 == 0)
    check(M, 14336, [(4008, r)], bias, only_y=M < 64)  # gradients of few tokens are few roundings


def test_the_scale_is_not_rounded_to_16_bits():
    """0.3 in bfloat16 is 0.30078."""
    x, weight, A, B = (
        torch.zeros(*size, device="cuda", dtype=DTYPE) for size in ((1, 14336), (4096, 14336), (16, 14336), (4096, 16))
    )
    x[:, 0], A[0, 0], B[:, 0] = 3, 1, 1
    y = lora_linear(x, weight, A, B, None, torch.tensor(0.3, device="cuda"))
    assert set(y.flatten().tolist()) == {torch.tensor(3.0 * 0.3).bfloat16().item()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_in_the_backward_pass_changes_nothing(dtype):
    x, parts = test_lora_group.make_group(16, 14336, [(4096, 16)], "cuda", DTYPE)
    y, wanted = lora_linear(x, **parts[0], scale=torch.ones(1, device="cuda")), [x, parts[0]["A"], parts[0]["B"]]
    want = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
    with torch.autocast("cuda", dtype):
        got = torch.autograd.grad(y, wanted, torch.ones_like(y))
    assert all(map(torch.equal, got, want))


def test_groups():
    check(64, 8192, [(8192, 24), (1024, 0), (8192, 8)])


@pytest.mark.parametrize("activation", test_lora_mlp.ACTS)
def test_mlps_without_gradients(activation):
    x, parts = test_lora_mlp.make_mlp(7, 8192, 8200, 4096, (16, 8, 5), "cuda", DTYPE)
    with torch.no_grad():
        assert not own_kernels(lambda: test_lora_mlp.fused(x, parts, activation))
    dy = randn(7, 4096, device="cuda", dtype=DTYPE)
    with torch.no_grad():
        y = test_lora_mlp.fused(x, parts, activation)
    want = test_lora_mlp.results(test_lora_mlp.fused, x, parts, dy, activation)["y"]
    error = ((y.double() - want.double()).norm() / want.double().norm()).item()
    assert error < 1e-2


def test_many_rows_small_weights_and_odd_ones_are_the_kernels():
    for M, K, N in ((1024, 4096, 4096), (64, 256, 264), (64, 14336, 4001)):
        x, parts = test_lora_group.make_group(M, K, [(N, 16)], "cuda", DTYPE)
        with torch.no_grad():
            assert own_kernels(lambda x=x, part=parts[0]: lora_linear(x, **part))


def test_explain_says_so():
    def told(M):
        return str(explain(in_features=14336, out_features=4096, r=16, tokens=M))

    assert "forward and backward by torch's products" in told(100)
    assert "note: backward by torch's products" in told(16)
    assert "expand_few_rows_kernel" in told(16)
    assert "by torch's products" not in told(4096)
