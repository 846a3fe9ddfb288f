"""lora_segments against each row by itself."""

import pytest
import torch
import torch._dynamo.testing

from fused_lora import segments
from fused_lora.ops import Adapter, Part, Routed, lora_segments
from fused_lora.reference import dropout, mask_threshold
from tests.segments.divisions import DIVISIONS, Division, places_of

K, WIDTHS = 40, (24, 33)


class Linear:
    """Factors in slabs, with tables of a division. Adapter i drops by ps[i]."""

    def __init__(self, division, N, dtype, seed, ps=None, K=K):
        generator = torch.Generator().manual_seed(seed)
        self.rnd = lambda *sizes: torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)
        self.division, self.plan = division, division.plan()
        self.places, R = places_of(division.ranks)
        self.weight, self.bias = self.rnd(N, K), self.rnd(N).requires_grad_()
        self.A, up = torch.zeros(R, K, dtype=dtype), torch.zeros(R, N, dtype=dtype)
        self.scales, self.ps, self.thresholds = torch.zeros(R // 16), ps, None
        if ps is not None:
            self.thresholds = torch.zeros(R // 16, dtype=torch.int32)
        self.factors = []
        for adapter, (place, r) in enumerate(zip(self.places, division.ranks, strict=True)):
            rows = slice(place.rank, place.rank + r)
            self.A[rows], up[rows] = self.rnd(r, K), self.rnd(r, N)
            slices = slice(place.rank // 16, (place.rank + place.size) // 16)
            self.scales[slices] = self.scale(adapter) / (1 - (ps[adapter] if ps else 0))
            if ps is not None:
                self.thresholds[slices] = mask_threshold(ps[adapter])
            self.factors.append((torch.nn.Parameter(self.A[rows].data), torch.nn.Parameter(up[rows].data.t())))
        self.B = up.t()

    def scale(self, adapter):
        return 0.5 + 0.25 * (adapter % 5)

    def routed(self):
        begins = self.division.begins()
        of = segments.constants(self.plan, torch.device("cpu"))
        tables = segments.tables(self.plan, of, self.division.ends(), self.division.M)
        adapters = [Adapter(*self.factors[a], self.places[a].rank, tuple(found)) for a, found in begins.items()]
        return Routed(
            Part(self.weight, self.A, self.B, self.bias, self.scales), tables, self.plan.window, tuple(adapters),
            self.thresholds,
        )  # fmt: skip

    def by_rows(self, x, seed=None):
        dropped = lambda adapter, level: x if seed is None else dropout(x, self.ps[adapter], seed + level)  # noqa: E731
        ys = []
        for i, adapters in enumerate(self.division.adapters):
            y = self.weight @ x[i] + self.bias
            for level, adapter in enumerate(adapters):
                A, B = self.factors[adapter]
                y = y + self.scale(adapter) * (B @ (A @ dropped(adapter, level)[i]))
            ys.append(y)
        return torch.stack(ys)

    @property
    def trained(self):
        return [factor for pair in self.factors for factor in pair]


class Problem:
    def __init__(self, division, dtype=torch.float64, ps=None):
        self.linears = [Linear(division, N, dtype, seed, ps) for seed, N in enumerate(WIDTHS)]
        rnd = self.linears[0].rnd
        self.x = rnd(division.M, K).requires_grad_()
        self.dys = [rnd(division.M, N) for N in WIDTHS]

    def __call__(self):
        return lora_segments(self.x, [linear.routed() for linear in self.linears])

    @property
    def inputs(self):
        return [self.x, *(tensor for linear in self.linears for tensor in (linear.bias, *linear.trained))]

    def expected(self):
        return [linear.by_rows(self.x) for linear in self.linears]


def assert_near(got, want, tolerance=1e-10):
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1, other.abs().max())


def grads(ys, problem, **options):
    return torch.autograd.grad(ys, problem.inputs, problem.dys, allow_unused=True, materialize_grads=True, **options)


@pytest.mark.parametrize("name", DIVISIONS)
def test_values_and_gradients(name):
    problem = Problem(DIVISIONS[name])
    ys, expected = problem(), problem.expected()
    assert_near(ys, expected)
    assert_near(grads(ys, problem), grads(expected, problem))
    with torch.no_grad():
        assert_near(problem(), expected)


@pytest.mark.parametrize("name", ["sums of two", "without adapters in between"])
def test_dropout(name):
    """Linears have masks of their own, and a backward pass those of its forward."""
    division = DIVISIONS[name]
    problem = Problem(division, ps=[(0.5, 0.0, 0.75)[adapter % 3] for adapter in range(len(division.ranks))])
    torch.manual_seed(3)
    ys = problem()
    torch.manual_seed(3)
    expected = [linear.by_rows(problem.x, torch.randint(2**62, ())) for linear in problem.linears]
    assert_near(ys, expected)
    assert not torch.equal(ys[0], problem()[0])
    assert_near(grads(ys, problem), grads(expected, problem))


def test_second_derivatives_of_dropout():
    problem = Problem(SMALL, ps=(0.5, 0.25, 0.0))

    def run(*_):
        torch.manual_seed(0)
        return problem()

    assert torch.autograd.gradgradcheck(run, problem.inputs[:4] + problem.linears[0].trained[2:4], fast_mode=True)


SMALL = Division((3, 20, 16), ((1, 3), (None, 2), (0, 2), (2, 0), (1, 2)), behind=1)


def test_adapters_without_rows_have_gradients_of_zeros():
    problem = Problem(SMALL)
    A, B = problem.linears[0].factors[2]
    dA, dB = torch.autograd.grad(problem(), (A, B), problem.dys)
    assert torch.equal(dA, torch.zeros_like(A))
    assert torch.equal(dB, torch.zeros_like(B))


def test_second_derivatives():
    problem = Problem(SMALL)
    assert torch.autograd.gradgradcheck(lambda *_: problem(), problem.inputs[:4] + problem.linears[0].trained[2:4])


def test_forward_derivatives_and_torch_func():
    problem, tangent = Problem(SMALL), torch.randn(8 + 2, K, dtype=torch.float64)
    _, got = torch.func.jvp(
        lambda x: lora_segments(x, [each.routed() for each in problem.linears]), (problem.x.detach(),), (tangent,)
    )
    _, want = torch.func.jvp(
        lambda x: tuple(each.by_rows(x) for each in problem.linears), (problem.x.detach(),), (tangent,)
    )
    assert_near(got, want)


def test_a_factor_that_changes_before_the_backward_pass_is_torchs_own_error():
    problem = Problem(SMALL)
    ys = problem()
    with torch.no_grad():
        problem.linears[0].factors[1][0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grads(ys, problem)


def test_other_adapters_may_change():
    """Those that have no segment."""
    problem = Problem(Division((8, 8), ((0, 5),)))
    ys = problem()
    with torch.no_grad():
        problem.linears[0].factors[1][0].mul_(2)
    assert_near(grads(ys, problem), grads(problem.expected(), problem))


@pytest.mark.parametrize("copies", [True, False])
def test_what_hooks_give_back_is_what_counts(copies):
    """Copies made of saved tensors are read, whatever has become of the factors."""
    problem = Problem(SMALL)
    want = grads(problem.expected(), problem)
    pack = (lambda tensor: tensor.clone()) if copies else (lambda tensor: tensor)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys = problem()
    if copies:
        for factor in problem.linears[0].trained:
            factor.data.mul_(3)
    assert_near(grads(ys, problem), want)


def test_factors_that_move_to_other_slabs_keep_their_values():
    problem = Problem(SMALL)
    ys, want = problem(), grads(problem.expected(), problem)
    linear = problem.linears[0]
    for factor in linear.trained:
        factor.data = factor.data.clone()
    linear.A.fill_(float("nan"))
    assert_near(grads(ys, problem), want)


def test_a_part_that_nobody_uses():
    problem = Problem(SMALL)
    got = torch.autograd.grad(problem()[1], problem.x, problem.dys[1])
    want = torch.autograd.grad(problem.expected()[1], problem.x, problem.dys[1])
    assert_near(got, want)


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled():
    """One program for every division of the rows."""
    torch._dynamo.reset()
    problem = Problem(SMALL)
    fixed = [linear.routed() for linear in problem.linears]
    plan = problem.linears[0].plan
    of = segments.constants(plan, torch.device("cpu"))

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(x, ends):
        found = segments.tables(plan, of, ends, len(x))
        return lora_segments(x, [each._replace(tables=found) for each in fixed])

    for counts in ((3, 2, 2, 0, 2), (0, 4, 1, 4, 1)):
        division = Division(SMALL.ranks, tuple(zip((1, None, 0, 2, 1), counts, strict=True)), behind=10 - sum(counts))
        for linear in problem.linears:
            linear.division = division
        ys = run(problem.x, division.ends())
        assert_near(ys, problem.expected())
        assert_near(grads(ys, problem), grads(problem.expected(), problem))
    assert counter.frame_count == 1


def test_autocast():
    problem = Problem(SMALL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = problem()
    assert {y.dtype for y in ys} == {torch.bfloat16}
    assert_near([y.float() for y in ys], problem.expected(), 2e-2)
    for grad, of in zip(grads([y.float() for y in ys], problem), problem.inputs, strict=True):
        assert grad.dtype == of.dtype


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"x": torch.zeros(10, K + 1)}, ValueError, "x must have 40 as its last dimension"),
    ({"x": torch.zeros(10, K, dtype=torch.bfloat16)}, TypeError, "x must have weight's dtype"),
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"x": torch.zeros(700, K)}, ValueError, "tables must be of x's 700 rows"),
    ({"window": 128}, ValueError, "window must be the same for all parts"),
])  # fmt: skip
def test_errors(change, error, words):
    problem = Problem(SMALL, torch.float32)
    routed = [linear.routed() for linear in problem.linears]
    routed[1] = routed[1]._replace(window=change.get("window", routed[1].window))
    with pytest.raises(error, match=words):
        lora_segments(change.get("x", problem.x), routed)
