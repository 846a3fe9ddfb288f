"""Formats against plain loops, and against bitsandbytes where it is installed."""

import itertools

import pytest
import torch

from fused_lora.formats import FP8, INT8, NF4, dequantise, format_of
from fused_lora.formats.fp8 import LARGEST
from fused_lora.formats.nf4 import VALUES, dynamic_values, unpack

SHAPES = [(33, 65), (130, 257), (64, 128), (7, 1000), (1, 1), (3, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [*(FP8(by, powers) for by, powers in itertools.product(("rows", "blocks", "tensor"), (False, True))),
           INT8(), NF4(), NF4(nested=True)]  # fmt: skip


def weight(shape, dtype=torch.float32, seed=0):
    """Of rows that differ in size."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.logspace(-2, 0, shape[0])[:, None]
    return values.to(dtype)


def blocks_of(shape, by):
    """Slices of the entries that have one scale."""
    N, K = shape
    if by == "tensor":
        return [(slice(0, N), slice(0, K))]
    rows, columns = (1, K) if by == "rows" else (128, 128)
    return [(slice(i, i + rows), slice(j, j + columns)) for i in range(0, N, rows) for j in range(0, K, columns)]


def nearest_e4m3(x):
    """By all of its numbers. Halfway it is the even one, which torch's own rounding knows: it may be either here."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].unique()
    return (x[..., None] - codes).abs().amin(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("by", ["rows", "blocks", "tensor"])
def test_fp8(by, powers, shape, dtype):
    W = weight(shape, dtype)
    form = FP8(by, powers)
    stored = form.quantise(W)
    found = dequantise(stored)
    scale = stored.scale
    assert (stored.codes.dtype, scale.dtype, stored.codes.shape) == (torch.float8_e4m3fn, torch.float32, W.shape)
    assert scale.numel() == len(blocks_of(shape, by))
    for of, block in zip(scale.flatten().tolist(), blocks_of(shape, by), strict=True):
        own = W[block].float()
        ideal = own.abs().max().item() / LARGEST
        assert ideal * (1 - 1e-6) <= of < ideal * (2 if powers else 1 + 1e-6)
        error = (found[block] - own).abs() / of
        assert (error <= nearest_e4m3(own / of) * (1 + 1e-5) + 1e-4).all()
    if powers:
        assert torch.equal(scale.log2(), scale.log2().round())
        assert torch.equal(dequantise(form.quantise(found)), found)
        assert torch.equal(dequantise(form.quantise(found.bfloat16())), found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8(shape, dtype):
    W = weight(shape, dtype)
    stored = INT8().quantise(W)
    scale = stored.scale
    assert torch.equal(scale, torch.stack([row.float().abs().max() for row in W]))
    for row, codes, of in zip(W.float(), stored.codes, scale, strict=True):
        assert (codes.float() - row * 127 / of).abs().max() <= 0.5 + 1e-4
    assert torch.allclose(dequantise(stored), stored.codes * scale[:, None] / 127)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nested", [False, True])
def test_nf4(nested, shape, dtype):
    """Blocks of 64 run on from row to row, and the last may be shorter; a byte's first code is its upper half."""
    W = weight(shape, dtype)
    flat, stored = W.float().flatten(), NF4(nested).quantise(W)
    assert stored.codes.shape == ((W.numel() + 1) // 2, 1)
    bytes_ = stored.codes.flatten().tolist()
    codes = [half for byte in bytes_ for half in (byte >> 4, byte & 15)][: W.numel()]
    plain = NF4().quantise(W).scale
    assert torch.equal(plain, torch.stack([block.abs().max() for block in flat.split(64)]))
    for i, code in enumerate(codes):
        distances = (flat[i] / plain[i // 64] - torch.tensor(VALUES)).abs()
        assert distances[code] <= distances.min() + 1e-6
    absmax = plain
    if nested:
        codes8, (offset, values, factors) = stored.scale, unpack(stored.outer)
        absmax = torch.stack([values[int(code)] * factors[i // 256] + offset for i, code in enumerate(codes8)])
        assert (absmax - plain).abs().max() <= 0.01 * (plain - offset).abs().max() + 1e-6
    want = torch.stack([torch.tensor(VALUES[code]) * absmax[i // 64] for i, code in enumerate(codes)])
    assert torch.equal(dequantise(stored).flatten(), want)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zeros_stay_zeros(form):
    """Rows, blocks, all: nothing is divided by 0."""
    W = weight((130, 192))
    W[3], W[:, 64:128] = 0, 0
    found = dequantise(form.quantise(W))
    assert found.isfinite().all()
    assert (found[3] == 0).all()
    assert (found[:, 64:128] == 0).all()
    assert (dequantise(form.quantise(torch.zeros(5, 70))) == 0).all()


@pytest.mark.parametrize(("form", "largest"), [
    (FP8("rows"), 0.03), (FP8("blocks"), 0.04), (FP8("tensor"), 0.08), (INT8(), 0.012), (NF4(), 0.1), (NF4(True), 0.1),
])  # fmt: skip
def test_how_much_is_lost(form, largest):
    """Of normal weights, in the root of the mean square."""
    W = weight((256, 512))
    assert ((dequantise(form.quantise(W)) - W).norm() / W.norm()).item() < largest


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("W", "words"), [
    (torch.zeros(3), r"weight must be a matrix of floats, got \(3,\)"),
    (torch.zeros(5, 0), r"weight must have entries, got \(5, 0\)"),
    (torch.zeros(3, 3, dtype=torch.int32), "weight must be a matrix of floats"),
    (torch.tensor([[1.0, float("nan")]]), "weight must be finite"),
])  # fmt: skip
def test_what_cannot_be_quantised(form, W, words):
    with pytest.raises(ValueError, match=words):
        form.quantise(W)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_alone(form, shape):
    """The same bits as in all of W, wherever they begin."""
    stored = form.quantise(weight(shape))
    whole, N = dequantise(stored), shape[0]
    for first, last in {(0, N), (N // 3, N), (N // 2, N // 2 + 1), (0, (N + 1) // 2), (N - 1, N)}:
        assert torch.equal(dequantise(stored, torch.float32, first, last), whole[first:last])


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_format_is_seen_in_what_is_stored(form, shape):
    """But for powers, and for scales of rows that are blocks' as well."""
    found, stored = format_of(form.quantise(weight(shape))), form.quantise(weight(shape))
    assert torch.equal(dequantise(stored), form.dequantise(stored, 0, shape[0]))
    assert type(found) is type(form)


def test_scales_of_no_kind():
    with pytest.raises(ValueError, match="by must be one of rows, blocks, tensor, got 'columns'"):
        FP8("columns")


@pytest.fixture
def functional(recwarn):
    return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_bitsandbytes(functional, shape, dtype):
    """Bit for bit: codes and absmax."""
    W = weight(shape, dtype)
    codes, state = functional.quantize_4bit(W, quant_type="nf4")
    stored = NF4().quantise(W)
    assert torch.equal(stored.codes, codes)
    assert torch.equal(stored.scale, state.absmax)


@pytest.mark.parametrize("shape", [(130, 257), (512, 512)])
def test_nested_nf4_is_bitsandbytes(functional, shape):
    """But for codes of absmax that lie between two of its values: its build for CPUs looks them up in a table of 2^16
    places, and its kernels and we take the nearest."""
    W = weight(shape)
    codes, state = functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    stored = NF4(nested=True).quantise(W)
    codes8, (offset, values, outer) = stored.scale, unpack(stored.outer)
    assert torch.equal(stored.codes, codes)
    assert torch.equal(outer, state.state2.absmax)
    assert torch.equal(values, state.state2.code)
    assert torch.equal(offset, state.offset)
    differ = (codes8.int() - state.absmax.int()).abs()
    assert differ.max() <= 1
    centred = state.absmax[differ > 0]
    assert len(centred) <= max(2, 0.005 * len(codes8))


def test_the_values_of_nested_scales():
    values = dynamic_values()
    assert len(values) == 256
    assert torch.equal(values, values.sort().values)
    assert values[-1] == 1
    assert torch.equal(-values[:127].flip(0), values[128:-1])
