"""The pair of ops behind linears, groups and MLPs: what torch may rely on of an op, and parts as flat lists."""

import pytest
import torch

from fused_lora import reference
from fused_lora.ops import Part
from fused_lora.ops.parts import SIZE, columns, flatten, unflatten
from tests.ops.problem import DEVICES, SCALE, make_inputs, randn, seed_on

ops = torch.ops.fused_lora
SILU = reference.ACTIVATIONS["silu"]
# Sizes and dtypes for plain torch and Triton, and for csrc.
KINDS = [
    pytest.param(10, 7, torch.float32, id="float32"),
    pytest.param(72, 136, torch.bfloat16, id="bfloat16"),
    pytest.param(72, 131, torch.float16, id="float16-odd"),
]


def make_parts(leading, K, sizes, device, dtype, lora_dtype, p=0.0, bias=True):
    """x and parts of (N, r), detached."""
    parts = []
    for i, (N, r) in enumerate(sizes):
        inputs = {
            name: t.detach() for name, t in make_inputs(leading, K, N, r, device, dtype, lora_dtype, bias).items()
        }
        x = inputs.pop("x")
        scale = torch.tensor(SCALE * (i + 1), device=device)
        parts.append(Part(**inputs, scale=scale, seed=seed_on(device) if p else None))
    return x, parts


def backward_arguments(x, parts, xas, p, needs, ys=()):
    """Of ys those of gains are read."""
    dys = [randn(*x.shape[:-1], len(part.weight), device=x.device, dtype=x.dtype) for part in parts]
    need_dx, *of_parts = needs
    wanted = [need for need in of_parts for _ in parts]
    read = [y if part.gain is not None else None for y, part in zip(ys, parts, strict=False)]
    return (
        dys, [x] * len(parts), flatten(parts), xas, [None] * len(parts), p, need_dx, wanted, [], [], False,
        read if any(y is not None for y in read) else [],
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("K", "N", "dtype"), KINDS)
@pytest.mark.parametrize(("leading", "lora_dtype"), [(12, None), ((2, 3), torch.float32)], ids=["2d", "3d-float32"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("more", [[], [(24, 5), (40, 8)]], ids=["one", "three"])
def test_opcheck(more, leading, p, lora_dtype, K, N, dtype, device):
    x, parts = make_parts(leading, K, [(N, 3), *more], device, dtype, lora_dtype, p, bias=p > 0)
    forward = (x, flatten(parts), p, [], "none")
    torch.library.opcheck(ops.lora_parts_forward.default, forward)
    xas = ops.lora_parts_forward(*forward)[len(parts) :]
    torch.library.opcheck(
        ops.lora_parts_backward.default, backward_arguments(x, parts, xas, p, (True, True, True, p > 0))
    )
    for needs in ((False, True, True, False), (True, False, False, p > 0)):  # of which the sizes of results depend
        arguments = backward_arguments(x, parts, xas, p, needs)
        torch.library.opcheck(ops.lora_parts_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("keep", ["none", "sides", "factors"])
def test_opcheck_gated(keep, p, device):
    x, parts = make_parts(48, 40, [(51, 8), (51, 5)], device, torch.bfloat16, torch.float32, p)
    forward = (x, flatten(parts), p, SILU, keep)
    torch.library.opcheck(ops.lora_parts_forward.default, forward)
    hidden, gate, up, *_ = ops.lora_parts_forward(*forward)
    if keep == "none":
        return
    _, (down,) = make_parts(48, 51, [(24, 7)], device, torch.bfloat16, torch.float32, p)
    xa = ops.lora_parts_forward(hidden, flatten([down]), p, [], "none")[1]
    dy = randn(48, 24, device=device, dtype=torch.bfloat16)
    needs = [False] * 3
    backward = ([dy], [gate], flatten([down]), [xa], [None], p, True, needs, SILU, [gate, up], keep == "factors", [])
    torch.library.opcheck(ops.lora_parts_backward.default, backward)
    *_, dxa = ops.lora_parts_backward(*backward)
    both = [*parts, down]
    xas = [*ops.lora_parts_forward(x, flatten(parts), p, [], "none")[2:], xa]
    rest = (
        [gate, up, dy],
        [x, x, hidden],
        flatten(both),
        xas,
        [None, None, dxa],
        p,
        True,
        [True] * 9,
        [],
        [],
        False,
        [],
    )
    torch.library.opcheck(ops.lora_parts_backward.default, rest)


def test_flat_lists():
    _, parts = make_parts(3, 4, [(5, 2), (6, 1)], "cpu", torch.float32, None)
    flat = flatten(parts)
    assert len(flat) == 2 * SIZE
    for part, again in zip(parts, unflatten(flat), strict=True):
        assert all(one is other for one, other in zip(part, again, strict=True))
    assert columns([1, 2, 3, 4, 5, 6], 2) == [[1, 2], [3, 4], [5, 6]]
