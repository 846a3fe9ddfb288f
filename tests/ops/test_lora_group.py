"""Linears that read one x, as one op: the results of each alone, and the sum of their gradients of x."""

import pytest
import torch

from fused_lora.ops.lora_group import lora_group
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
    columns = ([part.get(name) for part in parts] for name in ("weight", "A", "B", "bias"))
    return lora_group(x, *columns, [SCALE * (i + 1) for i in range(len(parts))], **options)


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
    got = results(grouped, x, parts, dys, **options)
    wide = cast({"x": x}, torch.float64)["x"], [cast(part, torch.float64) for part in parts]
    exact = results(alone(lora_linear_ref), *wide, [dy.double() for dy in dys], **options)
    by_torch = results(alone(unfused), x, parts, dys, **options)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_accurate(name, value, exact[name], by_torch[name])
