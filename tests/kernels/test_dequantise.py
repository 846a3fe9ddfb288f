"""The kernel that reads stored weights against formats' own reading, bit for bit: on the GPU or in the interpreter."""

import pytest
import torch

from fused_lora.formats import FP8, INT8, NF4, Stored, dequantise
from fused_lora.kernels import dequantise as kernel
from tests.kernels.problem import DEVICE

pytestmark = pytest.mark.interpreter

FORMATS = [FP8("rows"), FP8("blocks"), FP8("tensor"), INT8(), NF4(), NF4(nested=True)]
SHAPES = [(33, 65), (130, 257), (64, 128), (7, 1000), (1, 1), (34, 66), (9, 72)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
every_format = pytest.mark.parametrize("form", FORMATS, ids=str)


def stored_of(form, shape):
    """Scales of many sizes, down to float16's denormals; FP8 with every code, NaN among them."""
    weight = torch.randn(shape) * torch.logspace(-4, 2, shape[0])[:, None] * torch.logspace(-3, 1, shape[1])
    stored = form.quantise(weight)
    if isinstance(form, FP8):
        codes = stored.codes.view(torch.uint8).flatten()
        codes[:256] = torch.arange(256, dtype=torch.uint8)[: codes.numel()]
        stored = stored._replace(codes=codes.view(shape).view(torch.float8_e4m3fn))
    return Stored(*(each if each is None else each.to(DEVICE) for each in stored.tensors), *shape)


def assert_same(found, expected):
    """Also which are NaN."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@every_format
def test_whole(form, shape, dtype):
    stored, out = stored_of(form, shape), torch.full(shape, 7, dtype=dtype, device=DEVICE)
    kernel.dequantise(stored, out)
    assert_same(out, dequantise(stored, dtype))


@pytest.mark.parametrize(("rows", "cols"), [((0, 100), (64, 257)), ((70, 130), (0, 128)), ((129, 130), (128, 250))])
@pytest.mark.parametrize("K", [257, 258, 264, 320])
@every_format
def test_parts(form, K, rows, cols):
    """What lies around a part is left alone."""
    stored, around = stored_of(form, (130, K)), torch.full((140, 336), 7, dtype=torch.float16, device=DEVICE)
    out = around[5 : 5 + rows[1] - rows[0], 8 : 8 + cols[1] - cols[0]]
    kernel.dequantise(stored, out, rows[0], cols[0])
    assert_same(out, dequantise(stored, torch.float16)[slice(*rows), slice(*cols)])
    out.fill_(7)
    assert (around == 7).all()


@every_format
def test_tensors_that_start_anywhere(form):
    """Codes and scales as views that no wide access begins at, and an odd first column of out."""
    stored = stored_of(form, (40, 128))
    shifted = []
    for tensor in stored.tensors:
        if tensor is not None:
            room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)[1:].view(tensor.shape)
            tensor = room.copy_(tensor)
        shifted.append(tensor)
    out = torch.empty(40, 130, dtype=torch.bfloat16, device=DEVICE)[:, 1:129]
    kernel.dequantise(Stored(*shifted, 40, 128), out)
    assert_same(out, dequantise(stored, torch.bfloat16))


@pytest.mark.gpu
@every_format
def test_offsets_beyond_32_bits(form):
    N, K = 66, 2**25
    codes = torch.randint(256, (N * K // (1 if not isinstance(form, NF4) else 2),), dtype=torch.uint8, device="cuda")
    small = stored_of(form, (128, 1024))  # for dtypes
    shape = {"fp8 by rows": (N, 1), "fp8 by tensor": (), "fp8 by blocks": (1, K // 128), "int8": (N,)}
    shape = shape.get(form.name, (N * K // 64,))
    if small.scale.dtype is torch.uint8:
        scale = torch.randint(256, shape, dtype=torch.uint8, device="cuda")
        outer = torch.rand(257 + N * K // 64 // 256, device="cuda")
    else:
        scale, outer = torch.rand(shape, device="cuda"), None
    codes = codes[:, None] if isinstance(form, NF4) else codes.view(N, K).view(small.codes.dtype)
    stored, out = Stored(codes, scale, outer, N, K), torch.empty(2, K, dtype=torch.bfloat16, device="cuda")
    kernel.dequantise(stored, out, 64)
    assert_same(out, dequantise(stored, torch.bfloat16, 64, 66))
