"""Linears that read one x, as one op: the results of each alone, and the sum of their gradients of x."""

import pytest
import torch

from fused_lora.ops import Part, lora_group
from fused_lora.reference import lora_linear_ref
from tests.accuracy import assert_accurate
from tests.ops.problem import PLACES, SCALE, cast, make_inputs, randn, seed_on, unfused

# Out-features and rank of each part; a rank of 0 has no factors.
GROUPS = [
    [(72, 8), (72, 8), (72, 8)], [(96, 16), (24, 5), (40, 0)], [(33, 4)],
    [(64, 24), (9, 1), (17, 3), (128, 16), (8, 2)],
]  # fmt: skip


def make_group(M, K, sizes, device, dtype, bias=True):
    """x, and weight, A, B and bias of each part."""
    parts = []
    for N, r in sizes:
        part = make_inputs(M, K, N, max(r, 1), device, dtype, bias=bias)
        part["A"], part["B"] = (part[name].detach()[index].requires_grad_() for name, index in
                                (("A", slice(r)), ("B", (slice(None), slice(r)))))  # fmt: skip
        parts.append(part)
    x = parts[0]["x"]
    return x, [{name: value for name, value in part.items() if name != "x"} for part in parts]


def results(function, x, parts, dys, **options):
    """ys, dx and the gradients of each part by name."""
    ys = function(x, parts, **options)
    wanted = {(i, name): t for i, part in enumerate(parts) for name, t in part.items() if t.requires_grad}
    grads = torch.autograd.grad(ys, [x, *wanted.values()], dys)
    return {
        **{f"y{i}": y.detach() for i, y in enumerate(ys)},
        "dx": grads[0],
        **{f"d{name}{i}": grad for (i, name), grad in zip(wanted, grads[1:], strict=True)},
    }


def grouped(x, parts, **options):
    return lora_group(x, [Part(**part, scale=SCALE * (i + 1)) for i, part in enumerate(parts)], **options)


def alone(function):
    def run(x, parts, **options):
        return [function(x, **part, scale=SCALE * (i + 1), **options) for i, part in enumerate(parts)]

    return run


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_groups(device, dtype, sizes, p):
    x, parts = make_group((3, 17), 40, sizes, device, dtype)
    dys = [randn(*x.shape[:-1], N, device=device, dtype=dtype) for N, _ in sizes]
    options = {"p": p, "seed": seed_on(device)} if p else {}
    check(x, parts, dys, **options)


def check(x, parts, dys, roundings=0, **options):
    """Against float64, held to the unfused formula in x's dtype."""
    got = results(grouped, x, parts, dys, **options)
    wide = cast({"x": x}, torch.float64)["x"], [cast(part, torch.float64) for part in parts]
    exact = results(alone(lora_linear_ref), *wide, [dy.double() for dy in dys], **options)
    by_torch = results(alone(unfused), x, parts, dys, **options)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_accurate(name, value, exact[name], by_torch[name], roundings, x.dtype)


# M, K and the parts' (N, r): groups of rows and slices of tokens, narrow and wide tiles, every rank's kernel, rows that
# start anywhere, parts without factors, one that would ride alone.
WIDE = [
    (333, 264, [(392, 24), (264, 24)]), (5000, 520, [(1032, 128), (256, 128), (256, 128)]), (9000, 136, [(320, 16)]),
    (9000, 320, [(135, 16), (137, 8)]), (4100, 1037, [(523, 40), (8, 0), (1, 64)]), (2500, 264, [(392, 200), (136, 5)]),
    (6000, 3080, [(512, 128), (512, 64), (512, 16), (512, 1)]), (1, 8, [(8, 1), (8, 0)]),
    (4096, 1024, [(1024, 128)] * 3),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("M", "K", "sizes"), WIDE, ids=str)
def test_groups_of_many_rows(M, K, sizes, p):
    x, parts = make_group(M, K, sizes, "cuda", torch.bfloat16)
    dys = [randn(M, N, device="cuda", dtype=torch.bfloat16) for N, _ in sizes]
    options = {"p": p, "seed": seed_on("cuda")} if p else {}
    check(x, parts, dys, **options)


@pytest.mark.gpu
def test_groups_give_the_same_bits_each_time():
    x, parts = make_group(9000, 520, [(1032, 128), (255, 16), (256, 0)], "cuda", torch.bfloat16)
    dys = [randn(9000, N, device="cuda", dtype=torch.bfloat16) for N in (1032, 255, 256)]
    first = results(grouped, x, parts, dys)
    for _ in range(5):
        assert all(torch.equal(value, first[name]) for name, value in results(grouped, x, parts, dys).items())


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", ["x", "A", "B", "bias"])
def test_only_what_is_wanted(frozen):
    x, parts = make_group(3000, 264, [(392, 24), (136, 128)], "cuda", torch.bfloat16)
    dys = [randn(3000, N, device="cuda", dtype=torch.bfloat16) for N in (392, 136)]
    whole = results(grouped, x, parts, dys)
    tensors = {"x": [x]}.get(frozen) or [parts[1][frozen]]
    for tensor in tensors:
        tensor.requires_grad_(False)
    ys = grouped(x, parts)
    wanted = {f"d{name}{i}": t for i, part in enumerate(parts) for name, t in part.items() if t.requires_grad}
    wanted |= {"dx": x} if x.requires_grad else {}
    grads = torch.autograd.grad(ys, list(wanted.values()), dys)
    assert all(torch.equal(grad, whole[name]) for name, grad in zip(wanted, grads, strict=True))


@pytest.mark.parametrize("again", [False, True])
def test_a_part_that_nobody_used_has_no_gradients(again):
    x, parts = make_group(5, 8, [(12, 2), (7, 3), (9, 1)], "cpu", torch.float64)
    wanted = [x, *(part["A"] for part in parts)]
    y, _, z = grouped(x, parts)
    got = torch.autograd.grad((y.square().sum() + z.sum()), wanted, create_graph=again, allow_unused=True)
    assert got[2] is None
    y, _, z = alone(lora_linear_ref)(x, parts)
    want = torch.autograd.grad((y.square().sum() + z.sum()), wanted, allow_unused=True)
    for one, other in zip(got[:2] + got[3:], want[:2] + want[3:], strict=True):
        torch.testing.assert_close(one, other)
