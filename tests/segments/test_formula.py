"""The masked formula against a loop over segments."""

import pytest
import torch

from fused_lora.segments import backward_ref, constants, dxa_ref, forward_ref, lora_segments_ref, tables

from .divisions import DIVISIONS, places_of

K, N = 40, 24


class Problem:
    def __init__(self, division, dtype=torch.float64):
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

    def by_loops(self):
        """y, dx, and dA and dB by place."""
        y, dx = self.x @ self.weight.T + self.bias, self.dy @ self.weight
        dA, dB = torch.zeros_like(self.A), torch.zeros_like(self.B)
        for row, adapter in ((row, each) for row, own in enumerate(self.division.adapters) for each in own):
            place = self.places[adapter]
            own = slice(place.rank, place.rank + place.size)
            xa = self.scales[place.rank // 16] * (self.A[own] @ self.x[row])
            dxa = self.scales[place.rank // 16] * (self.dy[row] @ self.B[:, own])
            y[row] += self.B[:, own] @ xa
            dx[row] += dxa @ self.A[own]
            dA[own] += torch.outer(dxa, self.x[row])
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


@pytest.mark.parametrize("name", DIVISIONS)
def test_forward_and_backward(name):
    problem = Problem(DIVISIONS[name])
    of = (problem.scales, problem.tables, problem.plan.window)
    y, xa = forward_ref(problem.x, problem.weight, problem.A, problem.B, problem.bias, *of)
    dxa = dxa_ref(problem.dy, problem.B, *of)
    operands = (problem.dy, problem.x, problem.weight, problem.A, problem.B, xa, dxa)
    dx, dA, dB = backward_ref(*operands, *of, (True, True, True))
    assert dA.shape == (problem.plan.ranks, K)
    assert dB.shape == (N, problem.plan.ranks)
    for got, want in zip((y, dx, *problem.by_place(dA, dB)), problem.by_loops(), strict=True):
        assert near(got, want)


@pytest.mark.parametrize("name", DIVISIONS)
def test_by_autograd(name):
    problem = Problem(DIVISIONS[name])
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
    y = lora_segments_ref(x, problem.weight, problem.bias, adapters, problem.scales, problem.tables.rows)
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
