"""What rounding lost, as factors, against the singular values of the whole of it."""

import pytest
import torch

from fused_lora.formats import FP8, INT8, NF4, dequantise, stored
from fused_lora.formats.lost import lost_factors
from fused_lora.formats.merging import merge_

from .test_formats import weight
from .test_merging import copied, factors

FORMS = [FP8(), FP8("blocks"), FP8("tensor", powers=True), INT8(), NF4(), NF4(nested=True)]


def merged(form, shape, r, scale=0.25):
    """(before, after, A, B, all that was lost, in float64)."""
    before = form.quantise(weight(shape))
    after, (A, B) = copied(before), factors(shape, r, size=0.01)
    merge_(after, form, A, B, scale)
    return (
        before,
        after,
        A,
        B,
        dequantise(before).double() + scale * (B.double() @ A.double()) - dequantise(after).double(),
    )


@pytest.mark.parametrize("scale", [0.25, -3.0])
@pytest.mark.parametrize(
    ("shape", "r"), [((130, 257), 16), ((300, 64), 8), ((33, 65), 1), ((7, 1000), 12), ((40, 9), 9)]
)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_best_of_their_rank(form, shape, r, scale):
    before, after, A, B, lost = merged(form, shape, r, scale)
    new_A, new_B = lost_factors(before, after, form, A, B, scale)
    assert (new_A.shape, new_B.shape) == (A.shape, B.shape)
    best = torch.linalg.svdvals(lost)[r:].norm().item()
    left = (lost - scale * (new_B.double() @ new_A.double())).norm().item()
    assert best * (1 - 1e-6) - 1e-6 * lost.norm() <= left <= best * 1.002 + 1e-5 * lost.norm()
    assert torch.allclose(new_A.norm(dim=1), torch.full((r,), 3**-0.5), rtol=1e-3)


def test_in_parts(monkeypatch):
    before, after, A, B, _ = merged(NF4(), (130, 257), 4)
    whole = lost_factors(before, after, NF4(), A, B, 0.25)
    monkeypatch.setattr(stored, "CHUNK", 1000)
    parts = lost_factors(before, after, NF4(), A, B, 0.25)
    assert torch.allclose(whole[1] @ whole[0], parts[1] @ parts[0], atol=1e-6)


def test_of_nothing():
    """A is still a beginning, in all directions."""
    form = FP8()
    kept, (A, B) = form.quantise(weight((33, 65))), factors((33, 65), 4)
    new_A, new_B = lost_factors(kept, kept, form, A, B * 0, 0.25)
    assert (new_B == 0).all()
    assert torch.allclose(new_A @ new_A.T * 3, torch.eye(4), atol=1e-5)
    assert (new_A != 0).all()


def test_what_it_is_for():
    """Of an update of 1% NF4 takes in next to nothing; with the factors beside, less than half is missing."""
    form, shape = NF4(), (256, 256)
    before = form.quantise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    after, (A, B) = copied(before), factors(shape, 16, size=0.01)
    arrived = merge_(after, form, A, B, 0.25)
    new_A, new_B = lost_factors(before, after, form, A, B, 0.25)
    missing = dequantise(before) + 0.25 * (B @ A) - dequantise(after) - 0.25 * (new_B @ new_A)
    assert arrived.error > 1
    assert missing.norm() < 0.5 * (0.25 * (B @ A)).norm()


@pytest.mark.parametrize(("r", "least", "most"), [(0, 1.1, 2), (4, 1.1, 4), (60, 0, 0.3)])
def test_from_merge_to_merge(r, least, most):
    """Ten updates of 0.8%: with all of what was lost carried on they arrive in the end; with as much as the rank of one
    update they do not, no more than without."""
    form, shape = NF4(), (64, 64)
    kept = form.quantise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    first = total = dequantise(kept).double()
    rest_A, rest_B = torch.zeros(0, 64), torch.zeros(64, 0)
    for seed in range(10):
        A, B = factors(shape, 4, size=0.008, seed=seed)
        total = total + 0.25 * (B.double() @ A.double())
        A, B, before = torch.cat([A, rest_A]), torch.cat([B, rest_B], 1), copied(kept)
        merge_(kept, form, A, B, 0.25)
        if r > 0:
            rest_A, rest_B = lost_factors(before, kept, form, A, B, 0.25, r)
    drift = (dequantise(kept) + 0.25 * (rest_B @ rest_A) - total).norm() / (total - first).norm()
    assert least < drift.item() < most


def test_what_cannot_be():
    kept, (A, B) = INT8().quantise(weight((40, 9))), factors((40, 9), 10)
    with pytest.raises(ValueError, match="r must be at most in_features, 9, got 10"):
        lost_factors(kept, kept, INT8(), A, B, 0.25)
    with pytest.raises(ValueError, match="scale must not be 0"):
        lost_factors(kept, kept, INT8(), A[:3], B[:, :3], 0.0)
