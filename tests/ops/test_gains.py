"""Gains of single linears, groups and MLPs, forward and backward, in every order of sizes that decides how."""

import pytest
import torch

from tests.ops import test_lora_group as groups
from tests.ops import test_lora_mlp as mlps
from tests.ops.problem import PLACES, randn, seed_on

ROUNDINGS = 4  # of two operands, the gain times one of them, and y, from which sums are taken
WIDE = [
    (333, 264, [(392, 24), (264, 24)]), (5000, 520, [(1032, 128), (256, 128), (256, 128)]), (9000, 136, [(320, 16)]),
    (9000, 320, [(135, 16), (137, 8)]), (4100, 1037, [(523, 40), (8, 0), (1, 64)]), (2500, 264, [(392, 200), (136, 5)]),
    (6000, 3080, [(512, 128), (512, 64), (512, 16), (512, 1)]), (1, 8, [(8, 1), (8, 0)]), (700, 5461, [(2736, 16)]),
    (4096, 1024, [(1024, 128)] * 3),
]  # fmt: skip


def with_gains(parts, places=None):
    """From 1 to 1.5, some of them negative; of all parts, or of those in some places. Biases are small, so that y is as
    exact as the sums that are taken from it."""
    for i, part in enumerate(parts):
        N = len(part["weight"])
        if "bias" in part:
            part["bias"].data.mul_(0.1)
        gain = (1 + 0.5 * torch.rand(N)) * torch.where(torch.rand(N) < 0.2, -1, 1)
        if places is None or i in places:
            part["gain"] = gain.to(part["weight"].device).requires_grad_()
    return parts


def drops(p, device):
    return {"p": p, "seed": seed_on(device)} if p else {}


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("M", [3, 217])  # so few that gain dy is less than gain W, and so many that it is more
@pytest.mark.parametrize("places", [None, {1}])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_groups(device, dtype, bias, places, M, p):
    x, parts = groups.make_group(M, 40, [(96, 16), (73, 5), (40, 0)], device, dtype, bias)
    with_gains(parts, places)
    dys = [randn(M, N, device=device, dtype=dtype) for N in (96, 73, 40)]
    groups.check(x, parts, dys, ROUNDINGS, **drops(p, device))


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("M", "K", "sizes"), WIDE, ids=str)
def test_groups_of_many_rows(M, K, sizes, p):
    x, parts = groups.make_group(M, K, sizes, "cuda", torch.bfloat16)
    dys = [randn(M, N, device="cuda", dtype=torch.bfloat16) for N, _ in sizes]
    groups.check(x, with_gains(parts), dys, ROUNDINGS, **drops(p, "cuda"))


@pytest.mark.gpu
def test_the_same_bits_each_time():
    x, parts = groups.make_group(9000, 520, [(1032, 128), (255, 16), (256, 0)], "cuda", torch.bfloat16)
    with_gains(parts)
    dys = [randn(9000, N, device="cuda", dtype=torch.bfloat16) for N in (1032, 255, 256)]
    first = groups.results(groups.grouped, x, parts, dys)
    for _ in range(5):
        again = groups.results(groups.grouped, x, parts, dys)
        assert all(torch.equal(value, first[name]) for name, value in again.items())


@pytest.mark.parametrize("frozen", ["gain", "x", "A", "B", "bias"])
@pytest.mark.parametrize("M", [3, 217])
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_what_has_no_gradient(device, dtype, M, frozen):
    x, parts = groups.make_group(M, 40, [(96, 16), (73, 5)], device, dtype)
    with_gains(parts)
    for part in parts:
        if frozen in part:
            part[frozen].requires_grad_(False)
    dys = [randn(M, N, device=device, dtype=dtype) for N in (96, 73)]
    if frozen != "x":
        return groups.check(x, parts, dys, ROUNDINGS)
    whole = groups.results(groups.grouped, x, parts, dys)
    wanted = {(i, name): t for i, part in enumerate(parts) for name, t in part.items() if t.requires_grad}
    grads = torch.autograd.grad(groups.grouped(x.detach(), parts), list(wanted.values()), dys)
    for (i, name), grad in zip(wanted, grads, strict=True):
        want = whole[f"d{name}{i}"]
        assert (grad - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm()  # without dx the way is another one


@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_second_derivatives(device, dtype):
    x, parts = groups.make_group(33, 40, [(96, 16), (73, 5)], device, dtype)
    with_gains(parts, {0})
    wanted = [x, *(parts[0][name] for name in ("A", "B", "gain")), parts[1]["A"]]
    found = []
    for function in (groups.grouped, groups.alone(groups.unfused)):
        ys = function(x, parts)
        first = torch.autograd.grad([y.float().square().mean() for y in ys], wanted, create_graph=True)
        found.append(torch.autograd.grad(sum(grad.float().square().sum() for grad in first), wanted))
    for own, by_torch in zip(*found, strict=True):
        assert (own - by_torch).norm() <= 0.05 * by_torch.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_gain_of_zero(device, dtype):
    """Nothing is left of what it multiplied: it has a gradient of 0, and nobody else has any by way of it."""
    x, parts = groups.make_group(217, 40, [(16, 4)], device, dtype)
    gain = torch.ones(16, device=device)
    gain[3] = 0
    parts[0]["gain"] = gain.requires_grad_()
    found = groups.results(groups.grouped, x, parts, [randn(217, 16, device=device, dtype=dtype)])
    assert found["dgain0"][3] == 0
    assert not found["dB0"][3].any()
    assert found["dgain0"].isfinite().all()
    assert found["dgain0"].count_nonzero() == 15


# Of 20 rows gain dy is less than gain W.
@pytest.mark.parametrize("M", [(20,), (3, 217)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("places", [None, {0}, {1, 2}])
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_mlps(device, dtype, places, p, M):
    x, parts = mlps.make_mlp(M, 40, 131, 72, (8, 5, 7), device, dtype)
    with_gains(parts, places)
    dy = randn(*M, 72, device=device, dtype=dtype)
    options = drops(p, device)
    mlps.check(mlps.results(mlps.fused, x, parts, dy, "silu", **options), x, parts, dy, "silu", **options)


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("M", "K", "F", "N", "ranks"), [(4100, 520, 1032, 264, (16, 16, 16)), (2500, 264, 777, 136, (128, 5, 40))]
)
def test_mlps_of_many_rows(M, K, F, N, ranks, p):  # fmt: skip
    x, parts = mlps.make_mlp(M, K, F, N, ranks, "cuda", torch.bfloat16)
    with_gains(parts)
    dy, options = randn(M, N, device="cuda", dtype=torch.bfloat16), drops(p, "cuda")
    mlps.check(mlps.results(mlps.fused, x, parts, dy, "silu", **options), x, parts, dy, "silu", **options)
