"""csrc's kernels for rows with adapters of their own, against the formula in float64."""

import pytest
import torch

from fused_lora import segments
from fused_lora.ops import Adapter, Part, Routed, lora_segments, segmented
from tests.segments.divisions import DIVISIONS, Division, places_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]
SIZES = [(320, (456,)), (264, (136, 520, 72))]
UNEVEN = Division((16,) * 8, tuple(enumerate((4000, 1999, 1001, 500, 300, 192, 100, 100))))
LARGE = {
    "uneven": UNEVEN,
    "64 of 128": Division((16,) * 64, tuple((i, 128) for i in range(64))),
    "mixed ranks": Division((8, 16, 24, 32, 48, 64, 96, 128), tuple((i, 700) for i in range(8))),
    "backwards": Division((16,) * 40, tuple((39 - i, 99) for i in range(40))),
    "in turns": Division((16, 64, 200), tuple((i % 3, 130 + i) for i in range(30))),
    "a tree": Division(
        (64,) + (16,) * 6, tuple(((0, 1 + i % 3, *([4 + i % 2] * (i % 2))), 150 + i) for i in range(20))
    ),
    "windows that end where slices do": Division((16,) * 16, tuple((i, 1024) for i in range(16))),
    "mostly base": Division((16,) * 5, ((None, 3000), (2, 1), (None, 2000), (4, 300), (None, 7)), behind=900),
}


@pytest.fixture(autouse=True)
def _poisoned():
    """What is allocated next holds NaN where it is not written."""
    pools = [torch.full((n,), float("nan"), device="cuda") for n in (10**8, 10**7, 10**6, 10**5, 10**4)]
    del pools


class Linear:
    def __init__(self, division, K, N, dtype, lora_dtype, scale, generator):
        rnd = lambda *sizes, std=1.0: torch.randn(*sizes, generator=generator, device="cuda") * std  # noqa: E731
        self.division, self.plan = division, division.plan()
        self.places, R = places_of(division.ranks)
        self.weight = rnd(N, K, std=K**-0.5).to(dtype)
        self.bias = rnd(N).to(dtype).requires_grad_()
        self.A = torch.zeros(R, K, dtype=lora_dtype, device="cuda")
        up, self.scales = torch.zeros(R, N, dtype=lora_dtype, device="cuda"), torch.zeros(R // 16, device="cuda")
        self.factors = []
        for adapter, (place, r) in enumerate(zip(self.places, division.ranks, strict=True)):
            rows = slice(place.rank, place.rank + r)
            self.A[rows], up[rows] = rnd(r, K, std=K**-0.5), rnd(r, N, std=0.3 / scale)
            self.scales[place.rank // 16 : (place.rank + place.size) // 16] = scale * (0.5 + 0.25 * (adapter % 5))
            self.factors.append((torch.nn.Parameter(self.A[rows].data), torch.nn.Parameter(up[rows].data.t())))
        self.B = up.t()
        of = segments.constants(self.plan, torch.device("cuda"))
        self.tables = segments.tables(self.plan, of, division.ends("cuda"), division.M)

    def routed(self):
        begins = self.division.begins().items()
        adapters = tuple(Adapter(*self.factors[a], self.places[a].rank, tuple(found)) for a, found in begins)
        return Routed(
            Part(self.weight, self.A, self.B, self.bias, self.scales), self.tables, self.plan.window, adapters
        )

    def by_formula(self, x, dy, dtype):
        """(y, dx, dA, dB, dbias) in a dtype, dA and dB of the windows' ranks; factors as kernels read them."""
        of = (self.scales, self.tables, self.plan.window)
        A, B = (each.to(x.dtype).to(dtype) for each in (self.A, self.B))
        x, dy, weight, bias = (each.detach().to(dtype) for each in (x, dy, self.weight, self.bias))
        y, xa = segments.forward_ref(x, weight, A, B, bias, *of)
        dxa = segments.dxa_ref(dy, B, *of)
        dx, dA, dB = segments.backward_ref(dy, x, weight, A, B, xa, dxa, *of, (True, True, True))
        return y, dx, dA, dB, dy.sum(0)

    def gradients(self, dA, dB):
        """Of each adapter that has a segment, from those of the windows' ranks."""
        for adapter in self.routed().adapters:
            r = len(adapter.A)
            yield sum(dA[i : i + r] for i in adapter.begins), sum(dB[:, i : i + r] for i in adapter.begins)


class Problem:
    def __init__(self, division, K, Ns, dtype=torch.bfloat16, lora_dtype=None, scale=1.0):
        generator = torch.Generator("cuda").manual_seed(0)
        self.x = torch.randn(division.M, K, generator=generator, device="cuda").to(dtype).requires_grad_()
        self.linears = [Linear(division, K, N, dtype, lora_dtype or dtype, scale, generator) for N in Ns]
        self.dys = [torch.randn(division.M, N, generator=generator, device="cuda").to(dtype) for N in Ns]

    def run(self):
        """ys; dx; and of each linear its bias's gradient and its adapters'."""
        routed = [linear.routed() for linear in self.linears]
        of = [segmented.Segments(each.tables, each.window) for each in routed]
        assert segmented.obstacle(self.x, [each.part for each in routed], of, False) is None
        ys = lora_segments(self.x, routed)
        inputs = [self.x]
        for linear, each in zip(self.linears, routed, strict=True):
            inputs += [linear.bias, *(factor for adapter in each.adapters for factor in (adapter.A, adapter.B))]
        return [*ys, *torch.autograd.grad(ys, inputs, self.dys)]

    def by_formula(self, dtype):
        each = [linear.by_formula(self.x, dy, dtype) for linear, dy in zip(self.linears, self.dys, strict=True)]
        grads = []
        for linear, (_, _, dA, dB, dbias) in zip(self.linears, each, strict=True):
            grads += [dbias, *(grad for pair in linear.gradients(dA, dB) for grad in pair)]
        return [*(y for y, *_ in each), sum(dx for _, dx, *_ in each), *grads]


def assert_near(name, got, exact, torchs, dtype):
    """At most twice the formula's own error in this dtype, or two roundings of the largest entry; and 1.3 times it in
    the root of the mean square. (tests/accuracy.py's bounds of signed means are for sums over many rows.)"""
    assert got.shape == exact.shape, name
    error, allowed = (got.double() - exact).abs(), (torchs.double() - exact).abs()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs().max().item()
    largest = max(2 * allowed.max().item(), 2 * rounding) + 1e-30
    assert error.max().item() <= largest, f"{name}: largest error {error.max().item():.3e}, allowed {largest:.3e}"
    mean = 1.3 * allowed.square().mean().sqrt().item() + 0.1 * rounding + 1e-30
    assert error.square().mean().sqrt().item() <= mean, (
        f"{name}: {error.square().mean().sqrt().item():.3e}, allowed {mean:.3e}"
    )


def check(problem):
    got, exact, rounded = problem.run(), problem.by_formula(torch.float64), problem.by_formula(problem.x.dtype)
    for i, (one, other, torchs) in enumerate(zip(got, exact, rounded, strict=True)):
        assert_near(f"result {i}", one, other, torchs, problem.x.dtype)
    for _ in range(3):
        for one, other in zip(got, problem.run(), strict=True):
            assert torch.equal(one, other)  # nothing depends on the order in which blocks run
    return got


@pytest.mark.parametrize(("K", "Ns"), SIZES)
@pytest.mark.parametrize("name", [name for name in DIVISIONS if name != "nothing but rows behind"])
def test_divisions(name, K, Ns):
    check(Problem(DIVISIONS[name], K, Ns))


@pytest.mark.parametrize("name", LARGE)
def test_many_rows(name):
    check(Problem(LARGE[name], 1024, (768,)))


def test_groups_of_many_rows():
    """Shrink items of two blocks of rows, and sums over many slices, of several parts."""
    check(Problem(Division((16,) * 8, tuple((i, 1024) for i in range(8))), 1024, (1024, 1024, 1032)))


@pytest.mark.parametrize(("dtype", "lora_dtype", "scale"), [
    (torch.float16, None, 1.0), (torch.float16, None, 300.0), (torch.bfloat16, torch.float32, 1.0),
    (torch.float16, torch.float32, 300.0),
])  # fmt: skip
@pytest.mark.parametrize("name", ["mixed", "without adapters in between", "odd"])
def test_dtypes(name, dtype, lora_dtype, scale):
    check(Problem(DIVISIONS[name], 320, (456, 72), dtype, lora_dtype, scale))


@pytest.mark.parametrize(("K", "N"), [(8, 8), (100, 72), (72, 100), (63, 65), (128, 2048)])
def test_sizes(K, N):
    check(Problem(DIVISIONS["mixed"], K, (N,)))


def test_rows_without_adapters_are_the_bases_bit_for_bit():
    problem = Problem(LARGE["mostly base"], 1024, (768,))
    base = Problem(Division((16,) * 5, ((None, problem.x.shape[0]), (0, 0))), 1024, (768,))
    base.x, base.dys = problem.x, problem.dys
    for name in ("weight", "bias"):
        setattr(base.linears[0], name, getattr(problem.linears[0], name))
    (y, dx, *_), (base_y, base_dx, *_) = problem.run(), base.run()
    rows = torch.tensor([not own for own in problem.linears[0].division.adapters], device="cuda")
    assert torch.equal(y[rows], base_y[rows])
    assert torch.equal(dx[rows], base_dx[rows])


def test_what_is_no_number_in_factors_spoils_no_other_block():
    """Of 256 rows, nor gradients of adapters elsewhere."""
    problem = Problem(LARGE["64 of 128"], 256, (256,))
    with torch.no_grad():
        problem.linears[0].factors[16][0].fill_(float("inf"))
        problem.linears[0].factors[19][1].fill_(float("nan"))
    y, dx, _, *grads = problem.run()
    finite = torch.ones(len(y), dtype=torch.bool, device="cuda")
    finite[16 * 128 : 20 * 128] = False
    assert y[finite].isfinite().all()
    assert dx[finite].isfinite().all()
    others = [grad for i, grad in enumerate(grads) if i // 2 not in range(16, 20)]
    assert all(grad.isfinite().all() for grad in others)


def test_rows_behind_the_last_segment_may_be_anything():
    problem = Problem(DIVISIONS["rows behind"], 256, (256,))
    with torch.no_grad():
        problem.x[150:] = float("nan")
    problem.dys[0][150:] = float("nan")
    y, _, _, *grads = problem.run()
    assert y[:130].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def test_alone_and_mixed():
    """A row's result does not depend on whom it is computed with, bit for bit where its blocks lie alike."""
    mixed = Problem(Division((16, 16, 64), ((0, 256), (1, 512), (2, 256))), 512, (512,))
    y, dx, *_ = mixed.run()
    alone = Problem(Division((16, 16, 64), ((1, 512), (0, 0), (2, 0))), 512, (512,))
    alone.linears[0].__dict__.update(
        {k: v for k, v in mixed.linears[0].__dict__.items() if k in ("weight", "bias", "A", "B", "scales", "factors")}
    )
    alone.x, alone.dys = mixed.x.detach()[256:768].requires_grad_(), [mixed.dys[0][256:768]]
    one_y, one_dx, *_ = alone.run()
    assert torch.equal(y[256:768], one_y)
    assert torch.equal(dx[256:768], one_dx)


def test_rows_with_several_adapters_in_float16_are_not_for_csrc():
    problem = Problem(DIVISIONS["sums of two"], 64, (64,), torch.float16)
    routed = problem.linears[0].routed()
    found = segmented.obstacle(problem.x, [routed.part], [segmented.Segments(routed.tables, routed.window)], False)
    assert "several adapters in float16" in found


def test_one_graph_replays_any_division():
    division = Division((16, 16, 64), ((0, 300), (None, 200), (1, 500), (2, 24)))
    problem = Problem(division, 256, (384,))
    linear = problem.linears[0]
    problem.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [result.detach() for result in problem.run()]
    of = segments.constants(linear.plan, torch.device("cuda"))
    for counts in ((300, 200, 500, 24), (0, 0, 1024, 0), (1024, 0, 0, 0), (1, 1, 1, 1), (0, 1000, 0, 24)):
        other = Division(division.ranks, tuple(zip((0, None, 1, 2), counts, strict=True)), behind=1024 - sum(counts))
        new = segments.tables(linear.plan, of, other.ends("cuda"), 1024)
        for table, values in zip(linear.tables, new, strict=True):
            table.copy_(values)
        graph.replay()
        linear.division = other
        for one, want in zip(got, problem.run(), strict=True):
            assert torch.equal(one, want)
