"""Linears whose rows have adapters of their own, with the formula's results in float64 and in their own dtype."""

import torch

from fused_lora import segments
from fused_lora.ops import Adapter, Part, Routed, lora_segments, segmented
from fused_lora.reference import mask_threshold
from tests.kernels.problem import DEVICE
from tests.segments.divisions import Division, places_of

SEED = 5


class Linear:
    def __init__(self, division, K, N, dtype, lora_dtype, scale, generator, drops):
        rnd = lambda *sizes, std=1.0: torch.randn(*sizes, generator=generator, device=DEVICE) * std  # noqa: E731
        self.division, self.plan = division, division.plan()
        self.places, R = places_of(division.ranks)
        self.weight = rnd(N, K, std=K**-0.5).to(dtype)
        self.bias = rnd(N).to(dtype).requires_grad_()
        self.A = torch.zeros(R, K, dtype=lora_dtype, device=DEVICE)
        up, self.scales = torch.zeros(R, N, dtype=lora_dtype, device=DEVICE), torch.zeros(R // 16, device=DEVICE)
        self.factors = []
        for adapter, (place, r) in enumerate(zip(self.places, division.ranks, strict=True)):
            rows = slice(place.rank, place.rank + r)
            self.A[rows], up[rows] = rnd(r, K, std=K**-0.5), rnd(r, N, std=0.3 / scale)
            self.scales[place.rank // 16 : (place.rank + place.size) // 16] = scale * (0.5 + 0.25 * (adapter % 5))
            self.factors.append((torch.nn.Parameter(self.A[rows].data), torch.nn.Parameter(up[rows].data.t())))
        self.B = up.t()
        self.thresholds = self._drop(R) if drops else None
        of = segments.constants(self.plan, torch.device(DEVICE))
        self.tables = segments.tables(self.plan, of, division.ends(DEVICE), division.M)

    def _drop(self, R):
        """Thresholds; the scales get 1 / (1 - p)."""
        thresholds = torch.zeros(R // 16, dtype=torch.int32, device=DEVICE)
        for adapter, place in enumerate(self.places):
            p, slices = (0.25, 0.0, 0.9)[adapter % 3], slice(place.rank // 16, (place.rank + place.size) // 16)
            thresholds[slices] = mask_threshold(p)
            self.scales[slices] /= 1 - p
        return thresholds

    def routed(self):
        begins = self.division.begins().items()
        adapters = tuple(Adapter(*self.factors[a], self.places[a].rank, tuple(found)) for a, found in begins)
        return Routed(
            Part(self.weight, self.A, self.B, self.bias, self.scales), self.tables, self.plan.window, adapters,
            self.thresholds,
        )  # fmt: skip

    def by_formula(self, x, dy, dtype, seed):
        """(y, dx, dA, dB, dbias) in a dtype, dA and dB of the windows' ranks; factors as kernels read them."""
        of = (self.scales, self.tables, self.plan.window)
        drops = None if self.thresholds is None else segments.Drops(seed, self.thresholds)
        A, B = (each.to(x.dtype).to(dtype) for each in (self.A, self.B))
        x, dy, weight, bias = (each.detach().to(dtype) for each in (x, dy, self.weight, self.bias))
        y, xa = segments.forward_ref(x, weight, A, B, bias, *of, drops)
        dxa = segments.dxa_ref(dy, B, *of)
        dx, dA, dB = segments.backward_ref(dy, x, weight, A, B, xa, dxa, *of, (True, True, True), drops)
        return y, dx, dA, dB, dy.sum(0)

    def gradients(self, dA, dB):
        """Of each adapter that has a segment, from those of the windows' ranks."""
        for adapter in self.routed().adapters:
            r = len(adapter.A)
            yield sum(dA[i : i + r] for i in adapter.begins), sum(dB[:, i : i + r] for i in adapter.begins)


class Problem:
    def __init__(self, division, K, Ns, dtype=torch.bfloat16, lora_dtype=None, scale=1.0, backend="cuda", drops=False):
        self.backend = backend
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.x = torch.randn(division.M, K, generator=generator, device=DEVICE).to(dtype).requires_grad_()
        self.linears = [Linear(division, K, N, dtype, lora_dtype or dtype, scale, generator, drops) for N in Ns]
        self.dys = [torch.randn(division.M, N, generator=generator, device=DEVICE).to(dtype) for N in Ns]

    def run(self):
        """ys; dx; and of each linear its bias's gradient and its adapters'."""
        routed = [linear.routed() for linear in self.linears]
        of = [segmented.Segments(each.tables, each.window, each.thresholds) for each in routed]
        assert [segmented.backend(self.x, each.part, own) for each, own in zip(routed, of, strict=True)] == [
            self.backend
        ] * len(routed)
        if self.linears[0].thresholds is not None:
            torch.manual_seed(SEED)
        ys = lora_segments(self.x, routed)
        inputs = [self.x]
        for linear, each in zip(self.linears, routed, strict=True):
            inputs += [linear.bias, *(factor for adapter in each.adapters for factor in (adapter.A, adapter.B))]
        return [*ys, *torch.autograd.grad(ys, inputs, self.dys)]

    def by_formula(self, dtype):
        torch.manual_seed(SEED)
        seeds = [torch.randint(2**62, (), device=DEVICE) for _ in self.linears]
        linears = zip(self.linears, self.dys, seeds, strict=True)
        each = [linear.by_formula(self.x, dy, dtype, seed) for linear, dy, seed in linears]
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


def check(problem, times=3):
    """And that so many runs more have the same bits: nothing depends on the order in which blocks run."""
    got, exact, rounded = problem.run(), problem.by_formula(torch.float64), problem.by_formula(problem.x.dtype)
    for i, (one, other, torchs) in enumerate(zip(got, exact, rounded, strict=True)):
        assert_near(f"result {i}", one, other, torchs, problem.x.dtype)
    for _ in range(times):
        for one, other in zip(got, problem.run(), strict=True):
            assert torch.equal(one, other)
    return got


def check_graph(backend):
    """One captured graph replays any division of its rows."""
    division = Division((16, 16, 64), ((0, 300), (None, 200), (1, 500), (2, 24)))
    problem = Problem(division, 256, (384,), backend=backend)
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
