"""The specification itself: against torch's autograd in float64, and the statistics of its dropout mask."""

import itertools
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_lora import reference
from tests.accuracy import assert_accurate

M, K, N, R = 17, 13, 11, 3
SCALE = 0.6
SEED = torch.tensor(0x1234_5678_9ABC)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def matrices():
    return double(M, K), double(N, K), double(R, K), double(N, R)


@pytest.mark.parametrize("p", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward_are_autograds(bias, p):
    x, weight, A, B = matrices()
    bias, dy, seed = double(N) if bias else None, double(M, N), SEED if p else None
    scale = torch.tensor(SCALE, dtype=torch.float64)
    y, xa = reference.lora_linear_forward_ref(x, weight, A, B, bias, scale, seed, p)
    *grads, _ = reference.lora_linear_backward_ref(dy, x, weight, A, B, xa, scale, seed, p, (True, True, True))
    inputs = [t.requires_grad_() for t in (x, A, B)]
    want = reference.lora_linear_ref(x, weight, A, B, bias, SCALE, p, seed)
    exact = (want, *torch.autograd.grad(want, inputs, dy))
    for name, value, want in zip(("y", "dx", "dA", "dB"), (y, *grads), exact, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    dropped = torch.nn.functional.linear(reference.dropout(x, p, seed), A)
    torch.testing.assert_close(xa, SCALE * dropped)


def test_the_formula_entry_by_entry():
    """Against sums written out, with the mask as a matrix of zeros and 1 / (1 - p)."""
    x, weight, A, B = matrices()
    bias, p = double(N), 0.35
    dropped = x * reference.keep_mask(M, K, p, SEED) / (1 - p)
    want = torch.stack([
        torch.stack([
            sum(x[m, k] * weight[n, k] for k in range(K)) + bias[n]
            + SCALE * sum(dropped[m, k] * A[r, k] * B[n, r] for k in range(K) for r in range(R))
            for n in range(N)
        ]) for m in range(M)
    ])  # fmt: skip
    torch.testing.assert_close(reference.lora_linear_ref(x, weight, A, B, bias, SCALE, p, SEED), want)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_gradients_that_are_not_needed(needs):
    x, weight, A, B = matrices()
    scale, dy = torch.tensor(SCALE), double(M, N)
    xa = reference.lora_linear_forward_ref(x, weight, A, B, None, scale, None, 0.0)[1]
    arguments = (dy, x, weight, A, B, xa, scale, None, 0.0)
    *all_three, dxa = reference.lora_linear_backward_ref(*arguments, (True, True, True))
    *some, _ = reference.lora_linear_backward_ref(*arguments, needs)
    *given, _ = reference.lora_linear_backward_ref(*arguments, needs, 2 * dxa)
    for needed, want, got in zip(needs, all_three, some, strict=True):
        assert torch.equal(got, want) if needed else got is None
    for i, name in enumerate(("dx", "dA", "dB")):
        assert not needs[i] or torch.equal(given[i], all_three[i]) == (name == "dB"), "a given dxa is read, not made"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_each_result_is_rounded_once(dtype):
    """xa and y are what float64 gives, rounded: to within the fp32 sums' own error of the nearest value."""
    x, weight, A, B = (t.to(dtype) for t in matrices())
    scale = torch.tensor(SCALE)
    y, xa = reference.lora_linear_forward_ref(x, weight, A, B, None, scale, None, 0.0)
    assert (y.dtype, xa.dtype) == (dtype, dtype)
    exact_xa = float(scale) * x.double() @ A.double().T
    half_unit = torch.finfo(dtype).eps / 2
    assert ((xa.double() - exact_xa).abs() <= half_unit * exact_xa.abs() + 1e-5).all()
    exact_y = x.double() @ weight.double().T + xa.double() @ B.double().T
    assert ((y.double() - exact_y).abs() <= half_unit * exact_y.abs() + 1e-5).all()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_keep_rate(p):
    rows, cols = 800, 1000
    mask = reference.keep_mask(rows, cols, p, SEED)
    assert (mask.shape, mask.dtype) == ((rows, cols), torch.bool)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(mask.double().mean() - (1 - p)) < 5 * sigma / (rows * cols) ** 0.5
    # No row and no column is far off either: six sigma among 1,800 of them.
    assert (mask.double().mean(0) - (1 - p)).abs().max() < 6 * sigma / rows**0.5
    assert (mask.double().mean(1) - (1 - p)).abs().max() < 6 * sigma / cols**0.5


def correlation(a, b):
    """Of two masks, in units of what chance gives."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return ((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt() * a.numel() ** 0.5).abs()


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 0x1234_5678_9ABC, 2**62 - 1])
def test_neighbours_are_independent(seed, p):
    mask = reference.keep_mask(700, 900, p, torch.tensor(seed))
    for distance in (1, 2, 3, 8, 16, 32, 64, 128, 256):
        assert correlation(mask[distance:], mask[:-distance]) < 5, f"rows {distance} apart"
        assert correlation(mask[:, distance:], mask[:, :-distance]) < 5, f"columns {distance} apart"
        assert correlation(mask[distance:, distance:], mask[:-distance, :-distance]) < 5, f"diagonals {distance} apart"


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_no_row_repeats_another_shifted(p):
    """Rows are independent in all pairs, not only where they are neighbours."""
    mask = reference.keep_mask(3000, 256, p, SEED).double()
    mask = (mask - mask.mean()) / mask.std()
    for shift in (0, 1, 7):
        products = mask[:, shift:] @ mask[:, : 256 - shift].T / (256 - shift) ** 0.5
        if shift == 0:
            products.fill_diagonal_(0)
        # Of 9 million pairs the furthest is about 5.3 sigma; a repeated row is 16.
        assert products.abs().max() < 9


def surprise(mask, p):
    """How far the counts of True in mask's rows are from a binomial's: chi-square in its own standard deviations."""
    size = mask.shape[1]
    counts = torch.bincount(mask.sum(1), minlength=size + 1).double()
    expected = mask.shape[0] * torch.tensor([comb(size, k) * p ** (size - k) * (1 - p) ** k for k in range(size + 1)])
    often = expected > 20
    freedom = int(often.sum()) - 1
    return (((counts - expected) ** 2 / expected)[often].sum() - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("p", [0.125, 0.5])
@pytest.mark.parametrize("seed", [3, 2**50 + 1])
def test_the_entries_of_one_hash_are_independent_together(seed, p):
    """Of 32 columns, which share a hash; the upper halves of its products are the ones whose factors matter."""
    groups = reference.keep_mask(4096, 2048, p, torch.tensor(seed)).view(-1, 32)
    for part in (groups, groups[:, ::2], groups[:, 1::2], groups[:, :8], groups[:, 8:24:2]):
        assert surprise(part, p) < 5


@pytest.mark.parametrize("p", [0.0, 1e-5, 0.1, 0.3, 31 / 32, 0.97, 0.9999, 1.0])
def test_p_is_kept_to_the_nearest_two_to_the_minus_15(p, monkeypatch):
    """Over all numbers, of which each is as likely."""
    monkeypatch.setattr(reference, "mask_numbers", lambda M, K, seed, first: torch.arange(2**15).view(M, K))
    dropped = (~reference.keep_mask(1, 2**15, p, SEED)).double().mean()
    assert abs(dropped - p) <= 2**-16


@pytest.mark.parametrize("other", [0, 0x1234_5678_9ABD, 0x1235_5678_9ABC, 0x5678_9ABC])
def test_other_seeds_give_other_masks(other):
    mask = reference.keep_mask(700, 900, 0.5, SEED)
    assert torch.equal(mask, reference.keep_mask(700, 900, 0.5, SEED.clone()))
    assert correlation(mask, reference.keep_mask(700, 900, 0.5, torch.tensor(other))) < 5


def test_nothing_and_everything_dropped():
    assert reference.keep_mask(300, 200, 0.0, SEED).all()
    assert not reference.keep_mask(300, 200, 1.0, SEED).any()
    x = double(5, 4)
    assert torch.equal(reference.dropout(x, 0.0, SEED), x)
    assert torch.equal(reference.dropout(x, 0.5, None), x)
    assert torch.count_nonzero(reference.dropout(x, 1.0, SEED)) == 0


def test_a_higher_p_drops_more_of_the_same():
    fewer, more = (reference.keep_mask(300, 200, p, SEED) for p in (0.2, 0.6))
    assert (fewer | ~more).all()


@pytest.mark.parametrize(("rows", "cols"), [(1, 300), (37, 300), (200, 1), (200, 299), (1, 1)])
def test_the_mask_does_not_depend_on_its_size(rows, cols):
    mask = reference.keep_mask(200, 300, 0.4, SEED)
    assert torch.equal(reference.keep_mask(rows, cols, 0.4, SEED), mask[:rows, :cols])


def test_dropout_scales_what_it_keeps():
    x, p = double(300, 200) + 5, 0.35
    mask, dropped = reference.keep_mask(300, 200, p, SEED), reference.dropout(x, p, SEED)
    torch.testing.assert_close(dropped[mask], x[mask] / (1 - p))
    assert torch.count_nonzero(dropped[~mask]) == 0
    assert abs(dropped.mean() / x.mean() - 1) < 0.02
    assert torch.isfinite(reference.dropout(torch.full_like(x, float("nan")), p, SEED)[~mask]).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge(dtype):
    weight, A, B = double(75, 101).to(dtype), double(R, 101), double(75, R)
    exact = weight.double() + SCALE * B @ A
    unfused = weight + (SCALE * B @ A).to(dtype)
    reference.merge_ref_(weight, A, B, torch.tensor(SCALE, dtype=torch.float64))
    assert_accurate("weight", weight, exact, unfused)


def test_merge_keeps_the_bits_of_entries_without_an_update():
    weight = torch.tensor([[0.0, -0.0, float("nan"), 1e-45, 3.0]]).repeat(4, 1)
    B, A = torch.tensor([[0.0], [1.0], [0.0], [2.0]]), torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    before = weight.view(torch.int32).clone()
    reference.merge_ref_(weight, A, B, torch.tensor(0.5))
    unchanged = (B @ A == 0).expand_as(weight)
    assert torch.equal(weight.view(torch.int32)[unchanged], before[unchanged])
    assert torch.equal(weight[1, [0, 1, 3]], torch.full((3,), 0.5))


def rounding_down(t):
    """A cast to bf16 that truncates, as the widths differ only in the lower half of the word."""
    return (t.float().view(torch.int32) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def with_entry(t, value):
    t = t.clone()
    t[3, 5] = value
    return t


def test_the_tolerance_can_fail():
    exact = double(200, 100)
    nearest = exact.to(torch.bfloat16)
    twice = exact.float() * (1 + 2**-9 * torch.sign(torch.randn(200, 100)))  # one more rounding, as unfused torch has
    by_torch = twice.to(torch.bfloat16)
    assert_accurate("nearest", nearest, exact, by_torch)
    assert_accurate("torch", by_torch, exact, by_torch)
    wrong = {
        "truncated": rounding_down(exact),
        "coarse": exact.to(torch.float8_e4m3fn).to(torch.bfloat16),
        "shifted": (exact + 0.004).to(torch.bfloat16),
        "a little shifted": (exact + 0.001).to(torch.bfloat16),
        "one entry off": with_entry(nearest, 9.0),
        "a NaN": with_entry(nearest, float("nan")),
        "an infinity": with_entry(nearest, float("inf")),
        "transposed": nearest.T.reshape(200, 100),
        "another shape": nearest[:, :1],
    }
    for name, got in wrong.items():
        with pytest.raises(AssertionError, match=name):
            assert_accurate(name, got, exact, by_torch)


FLOAT_BITS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40)
DTYPES_16 = [torch.bfloat16, torch.float16]


def floats(bits):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def hard_cases(dtype):
    """Values of a 16-bit dtype, their midpoints, and the float32 beside those."""
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    high = high[high.isfinite()]
    above = (high.to(dtype).view(torch.int16) + 1).view(dtype).float()
    midpoints = ((high.double() + above.double()) / 2).float()
    near = [torch.nextafter(midpoints, torch.tensor(end)) for end in (-float("inf"), float("inf"))]
    return torch.cat([high, midpoints, *near])


@pytest.mark.parametrize("dtype", DTYPES_16, ids=str)
def test_halves_of_a_float32_at_every_midpoint(dtype):
    check_halves(hard_cases(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES_16, ids=str)
@given(FLOAT_BITS)
def test_halves_of_any_float32(dtype, bits):
    check_halves(floats(bits), dtype)


def check_halves(values, dtype):
    high, low = reference.split(values, dtype)
    assert high.dtype is dtype
    assert low.dtype is torch.int16
    joined = reference.join(high, low)
    whole = high.isfinite()
    assert torch.equal(joined.isnan(), values.isnan())
    if dtype is torch.float16:
        assert not low[~whole].any()
    exact = ~values.isnan() if dtype is torch.bfloat16 else whole & (values.abs() >= 2**-17)
    assert torch.equal(joined[exact].view(torch.int32), values[exact].view(torch.int32))
    assert ((joined - values)[whole].abs() <= 2**-41).all()
    nearest = values.to(dtype).float()
    slack = 0 if dtype is torch.bfloat16 else 2**-40  # a low that rounds to 2^15 goes to the other neighbour
    assert ((high.float() - values)[whole].abs() <= (nearest - values)[whole].abs() + slack).all(), "high is a nearest"


def test_the_halves_of_bfloat16_are_those_of_the_bits():
    values = torch.cat([hard_cases(torch.bfloat16), torch.randn(1000)])
    values = values[values.abs() < 3.38e38]
    high, low = reference.split(values, torch.bfloat16)
    bits = high.view(torch.int16).int() * 2**16 + low.int()
    assert torch.equal(bits, values.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES_16, ids=str)
def test_random_rounding_is_unbiased_and_to_a_neighbour(dtype):
    torch.manual_seed(0)
    values = (torch.randn(64, 1) * 10.0 ** torch.randint(-6, 4, (64, 1))).expand(64, 20_000).contiguous()
    rounded = reference.round_randomly(values, dtype, SEED).float()
    ulp = reference._ulp(values, dtype)
    assert ((rounded - values).abs() < ulp).all()
    assert ((rounded - values).mean(1) / ulp[:, 0]).abs().max() < 4 * 0.5 / 20_000**0.5
    exact = values.to(dtype).float()
    assert torch.equal(reference.round_randomly(exact, dtype, SEED).float(), exact)
    special = torch.tensor([[0.0, -0.0, float("inf"), -float("inf"), float("nan")]])
    assert torch.equal(
        reference.round_randomly(special, dtype, SEED).view(torch.int16), special.to(dtype).view(torch.int16)
    )


def test_uniform_numbers():
    values = reference.uniform(300, 400, 0.25, SEED)
    assert values.abs().max() < 0.25
    assert (values != 0).all()
    assert values.mean().abs() < 4 * 0.25 / (3 * values.numel()) ** 0.5
    assert abs(values.std() / (0.25 / 3**0.5) - 1) < 0.01
    assert torch.equal(values[:7, :9], reference.uniform(7, 9, 0.25, SEED)), "an entry is its place's, not its tensor's"
    assert (values == reference.uniform(300, 400, 0.25, SEED + 1)).float().mean() < 0.001


# The share of the updates' norm that 20 merges lose, W ~ N(0, 0.02).
@pytest.mark.parametrize("dtype", DTYPES_16, ids=str)
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_what_twenty_merges_lose(size, dtype):
    torch.manual_seed(0)
    first = (torch.randn(200, 300) * 0.02).to(dtype)
    factors = [(torch.randn(4, 300), torch.randn(200, 4) * (0.02 * size / 2)) for _ in range(20)]
    exact = first.double() + sum(B.double() @ A.double() for A, B in factors)

    def lost(**options):
        weight, low = first.clone(), options.get("low")
        for cycle, (A, B) in enumerate(factors):
            reference.merge_and_reinit_ref_(
                weight, A.clone(), B.clone(), torch.tensor(1.0), SEED + cycle, low, options.get("stochastic", False)
            )
        reached = (weight if low is None else reference.join(weight, low)).double()
        return ((reached - exact).norm() / (exact - first.double()).norm()).item()

    assert lost(low=torch.zeros(200, 300, dtype=torch.int16)) < 1e-3
    assert lost() > 1e-2
    assert lost(stochastic=True) > 1e-2


def test_nothing_added_keeps_both_halves():
    weight, low = torch.randn(5, 6).bfloat16(), torch.randint(-(2**15), 2**15, (5, 6)).to(torch.int16)
    before = weight.clone(), low.clone()
    reference.merge_and_reinit_ref_(weight, torch.randn(2, 6), torch.zeros(5, 2), torch.tensor(SCALE), SEED, low)
    assert torch.equal(weight.view(torch.int16), before[0].view(torch.int16))
    assert torch.equal(low, before[1])
