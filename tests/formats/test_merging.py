"""Merges into stored weights against whole matrices in float64, with scales and nearest values by hand."""

import pytest
import torch

from fused_lora.formats import FP8, INT8, NF4, dequantise, merging, stored
from fused_lora.formats.merging import Arrived, merge_
from fused_lora.formats.nf4 import VALUES, unpack
from fused_lora.hashing import half_bits

from .test_formats import FORMATS, SHAPES, blocks_of, weight

SCALE, SEEDS = 0.25, 300
LARGER = [(130, 257), (300, 64), (33, 65)]
NESTED = NF4(nested=True)


def factors(shape, r=3, size=0.1, seed=1):
    """Of a product whose entries lie around `size`."""
    generator = torch.Generator().manual_seed(seed)
    N, K = shape
    A, B = torch.randn(r, K, generator=generator), torch.randn(N, r, generator=generator)
    return A, B * (size / SCALE / r**0.5)


def in_halves(shape, r=2):
    """Factors whose product is exact, in whatever order it is summed."""
    generator = torch.Generator().manual_seed(2)
    N, K = shape
    return torch.randint(-3, 4, (r, K), generator=generator) / 16, torch.randint(-3, 4, (N, r), generator=generator) / 8


def copied(weight):
    return weight._replace(**{
        name: None if tensor is None else tensor.clone()
        for name, tensor in zip(("codes", "scale", "outer"), weight.tensors, strict=True)
    })  # fmt: skip


def bits(weight):
    return [
        tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor for tensor in weight.tensors if tensor is not None
    ]


def same_bits(one, other):
    return all(torch.equal(*pair) for pair in zip(bits(one), bits(other), strict=True))


def true_sum(before, A, B, residual=None):
    rest = 0 if residual is None else residual.double()
    return dequantise(before).double() + rest + SCALE * (B.double() @ A.double())


def values_of(form):
    if isinstance(form, FP8):
        found = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        return found[found.isfinite()].unique()
    return torch.arange(-127, 128).double() / 127 if isinstance(form, INT8) else torch.tensor(VALUES).double()


def slices(form, shape):
    """The entries, in W's flat order, of each block."""
    places = torch.arange(shape[0] * shape[1]).view(shape)
    if isinstance(form, NF4):
        return places.flatten().split(64)
    return [places[block].flatten() for block in blocks_of(shape, form.by if isinstance(form, FP8) else "rows")]


def scales_by_hand(form, weight):
    """Each block's scale as it stands in the tensors."""
    if not (isinstance(form, NF4) and form.nested):
        return weight.scale.double().flatten()
    offset, values, outer = unpack(weight.outer.double())
    return torch.stack([values[int(code)] * outer[i // 256] + offset for i, code in enumerate(weight.scale)])


def neighbours(form, weight, total):
    """For each entry the values at or below it and at or above it, by the weight's scales."""
    low, high = torch.empty_like(total).flatten(), torch.empty_like(total).flatten()
    for entries, scale in zip(slices(form, total.shape), scales_by_hand(form, weight), strict=True):
        values = (values_of(form) * scale).sort().values
        own = total.flatten()[entries].clamp(values[0], values[-1])
        above = (values < own[:, None]).sum(1)
        low[entries], high[entries] = values[(above - 1).clamp(min=0)], values[above]
    return low.view(total.shape), high.view(total.shape)


@pytest.mark.parametrize("size", [1e-3, 0.1, 30.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_nearest(form, shape, size):
    """By scales of the largest entries of the sum, and no other value of a block is nearer."""
    kept = form.quantise(weight(shape))
    A, B = factors(shape, size=size)
    total = true_sum(kept, A, B)
    pointers = [tensor.data_ptr() for tensor in bits(kept)]
    merge_(kept, form, A, B, SCALE)
    assert [tensor.data_ptr() for tensor in bits(kept)] == pointers
    largest = torch.stack([total.flatten()[entries].abs().max() for entries in slices(form, shape)])
    scales = scales_by_hand(form, kept)
    if form == NESTED:
        assert ((scales - largest).abs() <= 0.01 * (largest - unpack(kept.outer)[0]).abs().max() + 1e-7).all()
    else:
        ratio = scales / (largest / 448 if isinstance(form, FP8) else largest)
        assert ((ratio > 1 - 1e-5) & (ratio < (2 if getattr(form, "powers", False) else 1 + 1e-5))).all()
    low, high = neighbours(form, kept, total)
    nearest = torch.minimum((total - low).abs(), (high - total).abs())
    error = (dequantise(kept).double() - total).abs()
    assert (error <= nearest + 1e-5 * total.abs().max()).all()


@pytest.mark.parametrize("shape", LARGER)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_stochastic(form, shape):
    """Always a neighbour, in the mean the sum itself: each entry, and all of them together."""
    first = form.quantise(weight(shape))
    A, B = factors(shape, size=0.02)
    total, means = true_sum(first, A, B), torch.zeros(shape, dtype=torch.float64)
    for seed in torch.randint(2**62, (SEEDS,), generator=torch.Generator().manual_seed(0)):
        kept = copied(first)
        merge_(kept, form, A, B, SCALE, "stochastic", seed)
        means += dequantise(kept).double() / SEEDS
    low, high = neighbours(form, kept, total)
    found, slack = dequantise(kept).double(), 1e-5 * total.abs().max()
    assert (((found - low).abs() < slack) | ((found - high).abs() < slack)).all()
    sigma = ((high - total) * (total - low)).clamp(min=0).sqrt() / SEEDS**0.5
    error = means - total
    assert (error.abs() <= 6 * sigma + (high - low) / 50 + 1e-6).all()
    for signs in (torch.ones_like(total), total.sign()):
        assert (error * signs).mean().abs() <= 5 * sigma.norm() / total.numel() + 1e-7


def test_seeds():
    """The same one gives the same bits, a tensor too; others give others."""
    first, found = FP8().quantise(weight((64, 128))), []
    for seed in (5, torch.tensor(5), 6, 5 + 2**40):
        found.append(copied(first))
        merge_(found[-1], FP8(), *factors((64, 128)), SCALE, "stochastic", seed)
    assert same_bits(found[0], found[1])
    assert not same_bits(found[0], found[2])
    assert not same_bits(found[0], found[3])


def test_random_bits_of_rows_alone():
    seed = torch.tensor(9)
    assert torch.equal(half_bits(20, 7, seed, 5), half_bits(25, 7, seed)[5:])


@pytest.mark.parametrize("kind", ["nearest", "stochastic", "residual"])
@pytest.mark.parametrize("shape", [*LARGER, (7, 1000)])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_whole_or_in_parts(form, shape, kind, monkeypatch):
    first, (A, B), found = form.quantise(weight(shape)), in_halves(shape), []
    for chunk in (1, 1000, 1 << 22):
        monkeypatch.setattr(stored, "CHUNK", chunk)
        kept, residual = copied(first), weight(shape, torch.bfloat16, seed=4) * 1e-3
        options = {"stochastic": dict(rounding="stochastic", seed=3), "residual": dict(residual=residual)}.get(kind, {})
        arrived = merge_(kept, form, A, B, SCALE, **options)
        found.append((kept, residual, arrived))
    for kept, residual, arrived in found[:2]:
        assert same_bits(kept, found[2][0])
        assert torch.equal(residual, found[2][1])
        assert arrived.share == pytest.approx(found[2][2].share, rel=1e-9)
        assert arrived.error == pytest.approx(found[2][2].error, rel=1e-9)


@pytest.mark.parametrize("kind", ["nearest", "stochastic", "residual"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_where_nothing_is_added(form, kind):
    """Blocks keep their bits, and so does the residual beside them, however large; of scales that are rounded by 256
    blocks those of which none is changed."""
    shape = (260, 256)
    first, residual = form.quantise(weight(shape)), weight(shape, torch.bfloat16, seed=4)
    A, B = factors(shape)
    B[:128] = 0
    A[:, :64] = 0
    for up, touched in ((B * 0, torch.zeros(shape)), (B, (B @ A) != 0)):
        kept, rest = copied(first), residual.clone()
        options = {"stochastic": dict(rounding="stochastic", seed=3), "residual": dict(residual=rest)}.get(kind, {})
        merge_(kept, form, A, up, SCALE, **options)
        before, after = dequantise(first).flatten(), dequantise(kept).flatten()
        for i, entries in enumerate(slices(form, shape)):
            if not touched.flatten()[entries].any():
                moved = form == NESTED and i >= 512  # row 128 on: a block beside has changed
                assert torch.equal(before[entries], after[entries]) or moved
                assert torch.allclose(before[entries], after[entries], atol=0.05)
                assert moved or torch.equal(residual.flatten()[entries], rest.flatten()[entries])
        if not touched.any():
            assert same_bits(kept, first)
        elif not (isinstance(form, FP8) and form.by == "tensor"):
            assert not same_bits(kept, first)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_quantising_again_changes(form):
    """Nothing but the last bit of some of INT8's scales, and what is nested; powers may have it in other codes."""
    kept = form.quantise(weight((260, 256)))
    before, again = dequantise(kept), form.quantise(dequantise(kept))
    if form == NESTED:
        assert 0 < ((dequantise(again) - before).norm() / before.norm()).item() < 0.01
    elif isinstance(form, INT8):
        assert torch.equal(again.codes, kept.codes)
        assert ((again.scale - kept.scale).abs() <= 2**-23 * kept.scale).all()
    else:
        assert torch.equal(dequantise(again), before)
        assert getattr(form, "powers", False) or same_bits(again, kept)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_residual(form, shape):
    """Nothing is lost but what rounds the residual itself, in codes that are the nearest of the whole sum."""
    kept, residual = form.quantise(weight(shape)), torch.zeros(shape, dtype=torch.bfloat16)
    for step in range(5):
        A, B = factors(shape, size=0.01, seed=step)
        if step == 3:
            B[: shape[0] // 2] = 0
        total = true_sum(kept, A, B, residual)
        merge_(kept, form, A, B, SCALE, residual=residual)
        error = (dequantise(kept).double() + residual.double() - total).abs()
        assert (error <= 2**-8 * residual.double().abs() + 3e-7 * total.abs().max()).all()
        low, high = neighbours(form, kept, total)
        nearest = torch.minimum((total - low).abs(), (high - total).abs())
        touched = (B != 0).any(1)
        wrong = (dequantise(kept).double() - total).abs() > nearest + 1e-5 * total.abs().max()
        assert not wrong[touched].any()


def test_a_large_residual_is_taken_in():
    """What a user gives may be larger than a step."""
    first, residual = INT8().quantise(weight((9, 33))), torch.ones(9, 33)
    kept, (A, B) = copied(first), factors((9, 33), size=1e-3)
    total = true_sum(kept, A, B, residual)
    merge_(kept, INT8(), A, B, SCALE, residual=residual)
    assert torch.allclose(dequantise(kept).double() + residual, total, atol=1e-6)
    assert residual.abs().max() < 0.05


@pytest.mark.parametrize("kind", ["nearest", "stochastic", "residual"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_arrived(form, kind):
    shape = (130, 257)
    kept, residual = form.quantise(weight(shape)), weight(shape, torch.bfloat16, seed=4) * 1e-3
    options = {"stochastic": dict(rounding="stochastic", seed=3), "residual": dict(residual=residual)}.get(kind, {})
    A, B = factors(shape, size=0.01)
    counts = kind == "residual"
    before = dequantise(kept).double() + counts * residual.double()
    arrived = merge_(kept, form, A, B, torch.tensor(SCALE), **options)
    change, delta = dequantise(kept).double() + counts * residual.double() - before, SCALE * (B.double() @ A.double())
    assert arrived.size == pytest.approx((delta.norm() / before.norm()).item(), rel=1e-5)
    assert arrived.share == pytest.approx(((change * delta).sum() / delta.norm() ** 2).item(), rel=1e-5, abs=1e-6)
    assert arrived.error == pytest.approx(((change - delta).norm() / delta.norm()).item(), rel=1e-4, abs=1e-6)


def test_arrived_of_nothing():
    kept, (A, B) = INT8().quantise(weight((9, 33))), factors((9, 33))
    assert merge_(kept, INT8(), A, B * 0, SCALE) == Arrived(0.0, 1.0, 0.0)
    kept = INT8().quantise(torch.zeros(9, 33))
    arrived = merge_(kept, INT8(), A, B, SCALE)
    assert arrived.size == float("inf")
    assert arrived.share == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize("form", [FP8(), INT8(), NF4()], ids=str)
def test_factors_of_16_bits(form):
    """Are read exactly."""
    first, (A, B) = form.quantise(weight((33, 65))), (factor.bfloat16() for factor in factors((33, 65)))
    wide, narrow = copied(first), copied(first)
    merge_(wide, form, A.float(), B.float(), SCALE)
    merge_(narrow, form, A, B.requires_grad_(), SCALE)
    assert same_bits(wide, narrow)


A, B = factors((130, 65))


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[-1, -1] = float("nan")
    return tensor


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("change", "words"), [
    (dict(A=A.T), r"A must have shape \(r, 65\) to match W \(130, 65\), got \(65, 3\)"),
    (dict(B=B[1:]), r"B must have shape \(130, 3\) to match W and A, got \(129, 3\)"),
    (dict(A=with_nan(A)), "W \\+ scale B A must be finite"),
    (dict(B=with_nan(B)), "W \\+ scale B A must be finite"),
    (dict(scale=float("inf")), "W \\+ scale B A must be finite"),
    (dict(residual=with_nan(torch.zeros(130, 65))), "W \\+ scale B A must be finite"),
    (dict(residual=torch.zeros(65, 130)), r"residual must be floats of shape \(130, 65\), got \(65, 130\)"),
    (dict(residual=torch.zeros(130, 65).short()), "residual must be floats"),
    (dict(rounding="up"), "rounding must be one of nearest, stochastic, got 'up'"),
    (dict(rounding="stochastic"), "seed must be given"),
    (dict(rounding="stochastic", seed=1, residual=torch.zeros(130, 65)), "rounding must be nearest"),
])  # fmt: skip
def test_all_or_nothing(form, change, words, monkeypatch):
    """In the last rows too, when all others have been seen."""
    monkeypatch.setattr(stored, "CHUNK", 1)
    kept = form.quantise(weight((130, 65)))
    before, residual = copied(kept), change.get("residual")
    rest = None if residual is None else residual.clone()
    with pytest.raises(ValueError, match=words):
        merge_(kept, form, **(dict(A=A, B=B, scale=SCALE) | change))
    assert same_bits(kept, before)
    assert rest is None or torch.equal(rest.nan_to_num(9), residual.nan_to_num(9))


def test_a_gradient_of_what_was_sees_the_change():
    kept = INT8().quantise(weight((9, 33)))
    versions = [tensor._version for tensor in bits(kept)]
    merge_(kept, INT8(), *factors((9, 33)), SCALE)
    assert all(tensor._version > version for tensor, version in zip(bits(kept), versions, strict=True))


@pytest.mark.parametrize("kind", ["nearest", "stochastic", "residual"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_merge_that_breaks_off_changes_nothing(form, kind, monkeypatch):
    """After a part of the rows is written."""
    monkeypatch.setattr(stored, "CHUNK", 1)
    shape = (300, 64)
    kept, residual = form.quantise(weight(shape)), weight(shape, torch.bfloat16, seed=4) * 1e-3
    options = {"stochastic": dict(rounding="stochastic", seed=3), "residual": dict(residual=residual)}.get(kind, {})
    before, rest, real, calls = copied(kept), residual.clone(), merging._write, []

    def broken(*arguments):
        if len(calls) == 2:
            assert not same_bits(kept, before)
            raise KeyboardInterrupt
        calls.append(real(*arguments))
        return calls[-1]

    monkeypatch.setattr(merging, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        merge_(kept, form, *factors(shape), SCALE, **options)
    assert same_bits(kept, before)
    assert torch.equal(residual, rest)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_all_bytes_of_a_weight(form):
    """Of odd numbers of codes, after which no float32 begins."""
    kept = form.quantise(weight((33, 65)))
    first, before = kept.bytes(), copied(kept)
    merge_(kept, form, *factors((33, 65)), SCALE)
    assert not same_bits(kept, before)
    kept.set_bytes_(first)
    assert same_bits(kept, before)
