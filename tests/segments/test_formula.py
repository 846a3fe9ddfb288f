"""The masked formula against a loop over segments."""

import pytest
import torch

from fused_lora.reference import keep_mask, mask_threshold
from fused_lora.segments import Drops, backward_ref, constants, dxa_ref, forward_ref, lora_segments_ref, tables

from .divisions import DIVISIONS, places_of

K, N = 40, 24
PS = (0.25, 0.0, 0.99, 0.5, 1.0)  # by which adapters drop


class Problem:
    def __init__(self, division, dtype=torch.float64, drops=False):
        self.ps = [PS[adapter % len(PS)] if drops else 0.0 for adapter in range(len(division.ranks))]
        generator = torch.Generator().manual_seed(0)
        rnd = lambda *sizes: torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
        self.division, self.plan = division, division.plan()
        self.places, R = places_of(division.ranks)
        self.x, self.weight, self.bias, self.dy = rnd(division.M, K), rnd(N, K), rnd(N), rnd(division.M, N)
        self.A, self.B = torch.zeros(R, K, dtype=dtype), torch.zeros(N, R, dtype=dtype)
        self.scales = torch.full((R // 16,), float("nan"))
        for adapter, (place, r) in enumerate(zip(self.places, division.ranks, strict=True)):
            self.A[place.rank : place.rank + r], self.B[:, place.rank : place.rank + r] = rnd(r, K), rnd(N, r)
            self.scales[place.rank // 16 : (place.rank + place.size) // 16] = 0.5 + 0.25 * (adapter % 5)
        self.scales = self.scales.nan_to_num(7.0)
        self.tables = tables(self.plan, constants(self.plan, torch.device("cpu")), division.ends(), division.M)
        self.drops = Drops(torch.tensor(77), self._drop(R)) if drops else None
        self.of = (self.scales, self.tables, self.plan.window)

    def _drop(self, R):
        """Thresholds; the scales get 1 / (1 - p)."""
        thresholds = torch.zeros(R // 16, dtype=torch.int32)
        for place, p in zip(self.places, self.ps, strict=True):
            slices = slice(place.rank // 16, (place.rank + place.size) // 16)
            thresholds[slices] = mask_threshold(p)
            self.scales[slices] *= 0 if p == 1 else 1 / (1 - p)
        return thresholds

    def mask(self, adapter, level):
        seed = 0 if self.drops is None else self.drops.seed + level
        return keep_mask(len(self.x), K, self.ps[adapter], torch.as_tensor(seed)).double()

    def by_loops(self):
        """y, dx, and dA and dB by place."""
        y, dx = self.x @ self.weight.T + self.bias, self.dy @ self.weight
        dA, dB = torch.zeros_like(self.A), torch.zeros_like(self.B)
        masks = {(adapter, level): self.mask(adapter, level) for adapter in range(len(self.ps)) for level in range(4)}
        each = ((row, place) for row, own in enumerate(self.division.adapters) for place in enumerate(own))
        for row, (level, adapter) in each:
            place, mask = self.places[adapter], masks[adapter, level][row]
            own, x = slice(place.rank, place.rank + place.size), self.x[row] * mask
            xa = self.scales[place.rank // 16] * (self.A[own] @ x)
            dxa = self.scales[place.rank // 16] * (self.dy[row] @ self.B[:, own])
            y[row] += self.B[:, own] @ xa
            dx[row] += dxa @ self.A[own] * mask
            dA[own] += torch.outer(dxa, x)
            dB[:, own] += torch.outer(self.dy[row], xa)
        return y, dx, dA, dB

    def by_place(self, dA, dB):
        """Gradients of windows' ranks as those of the slabs."""
        all_dA, all_dB = torch.zeros_like(self.A), torch.zeros_like(self.B)
        each = {pair for level in self.plan.levels for pair in zip(level.begins, level.places, strict=True)}
        for begin, place in each:
            if place is not None:
                all_dA[place.rank : place.rank + place.size] += dA[begin : begin + place.size]
                all_dB[:, place.rank : place.rank + place.size] += dB[:, begin : begin + place.size]
        return all_dA, all_dB


def near(got, want, tolerance=1e-10):
    return (got - want).abs().max().item() <= tolerance * max(1, want.abs().max().item())


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", DIVISIONS)
def test_forward_and_backward(name, drops):
    problem = Problem(DIVISIONS[name], drops=drops)
    of = problem.of
    y, xa = forward_ref(problem.x, problem.weight, problem.A, problem.B, problem.bias, *of, problem.drops)
    dxa = dxa_ref(problem.dy, problem.B, *of)
    operands = (problem.dy, problem.x, problem.weight, problem.A, problem.B, xa, dxa)
    dx, dA, dB = backward_ref(*operands, *of, (True, True, True), problem.drops)
    assert dA.shape == (problem.plan.ranks, K)
    assert dB.shape == (N, problem.plan.ranks)
    for got, want in zip((y, dx, *problem.by_place(dA, dB)), problem.by_loops(), strict=True):
        assert near(got, want)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("name", DIVISIONS)
def test_by_autograd(name, drops):
    problem = Problem(DIVISIONS[name], drops=drops)
    x, A, B = (each.clone().requires_grad_() for each in (problem.x, problem.A, problem.B))
    begins = {place: [] for place in problem.places}
    for level in problem.plan.levels:
        for begin, place in zip(level.begins, level.places, strict=True):
            if place is not None:
                begins[place].append(begin)
    adapters = [
        (A[place.rank : place.rank + place.size], B[:, place.rank : place.rank + place.size], found)
        for place, found in begins.items()
        if found
    ]
    y = lora_segments_ref(x, problem.weight, problem.bias, adapters, problem.scales, problem.tables.rows, problem.drops)
    want_y, *want = problem.by_loops()
    assert near(y, want_y)
    grads = torch.autograd.grad(y, (x, A, B), problem.dy, materialize_grads=True)
    for got, expected in zip(grads, want, strict=True):
        assert near(got, expected)


def test_rows_are_not_touched_by_what_is_no_number_elsewhere():
    problem = Problem(DIVISIONS["without adapters in between"], torch.float32)
    of = (problem.scales, problem.tables, problem.plan.window)
    base = torch.nn.functional.linear(problem.x, problem.weight, problem.bias)
    problem.A[problem.places[1].rank] = float("inf")
    problem.A[problem.places[2].rank] = float("nan")
    y, _ = forward_ref(problem.x, problem.weight, problem.A, problem.B, problem.bias, *of)
    rows = torch.tensor([not own for own in problem.division.adapters])
    assert torch.equal(y[rows], base[rows])
    own = torch.tensor([own == (0,) for own in problem.division.adapters])
    assert y[own].isfinite().all()


def test_rows_without_adapters_may_hold_anything():
    problem = Problem(DIVISIONS["without adapters in between"])
    want = problem.by_place(*_gradients(problem))
    bare = torch.tensor([not own for own in problem.division.adapters])
    problem.x[bare] = problem.dy[bare] = float("nan")
    for got, expected in zip(problem.by_place(*_gradients(problem)), want, strict=True):
        assert torch.equal(got, expected)


def _gradients(problem):
    """dA and dB."""
    of = (problem.scales, problem.tables, problem.plan.window)
    _, xa = forward_ref(problem.x, problem.weight, problem.A, problem.B, problem.bias, *of)
    operands = (problem.dy, problem.x, problem.weight, problem.A, problem.B, xa, dxa_ref(problem.dy, problem.B, *of))
    return backward_ref(*operands, *of, (False, True, True))[1:]


def test_float16_keeps_its_room():
    problem = Problem(DIVISIONS["odd"], torch.float16)
    problem.x, problem.scales = problem.x * 50, problem.scales * 512
    of = (problem.scales, problem.tables, problem.plan.window)
    y, xa = forward_ref(problem.x, problem.weight, problem.A, problem.B * 2**-12, problem.bias, *of)
    assert xa.isfinite().all()
    exact = Problem(DIVISIONS["odd"])
    exact.x, exact.weight, exact.A, exact.bias = (
        each.double() for each in (problem.x, problem.weight, problem.A, problem.bias)
    )
    exact.B, exact.scales = problem.B.double() * 2**-12, problem.scales
    assert near(y.double(), exact.by_loops()[0], 2e-3)
