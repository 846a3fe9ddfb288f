"""lora_segments_mlp against each row by itself, and csrc's gated passes against float64."""

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

from fused_lora import backends, choices, segments
from fused_lora.ops import lora_segments_mlp
from fused_lora.ops.lora_segments_mlp import obstacle
from tests.ops import segments_problem
from tests.ops.test_lora_segments import SMALL, K, Linear, assert_near
from tests.segments.divisions import DIVISIONS, Division

WIDE, N = 24, 33
ACTS = {"silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}


class MLP:
    """Three linears of one division, in slabs of their own."""

    def __init__(self, division, dtype=torch.float64, activation="silu", save="all", ps=None):
        sizes = ((K, WIDE), (K, WIDE), (WIDE, N))
        self.linears = [Linear(division, columns, dtype, i, ps, depth) for i, (depth, columns) in enumerate(sizes)]
        rnd = self.linears[0].rnd
        self.x, self.dy = rnd(division.M, K).requires_grad_(), rnd(division.M, N)
        self.options = {"activation": activation, "save": save}

    def __call__(self):
        return lora_segments_mlp(self.x, *(linear.routed() for linear in self.linears), **self.options)

    @property
    def inputs(self):
        return [self.x, *(tensor for linear in self.linears for tensor in (linear.bias, *linear.trained))]

    def expected(self, seeds=(None,) * 3):
        gate, up, down = self.linears
        hidden = ACTS[self.options["activation"]](gate.by_rows(self.x, seeds[0])) * up.by_rows(self.x, seeds[1])
        return down.by_rows(hidden, seeds[2])

    def grads(self, y):
        return torch.autograd.grad(y, self.inputs, self.dy, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("save", ["all", "less"])
@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize("name", ["mixed", "odd", "sums of two", "without adapters in between"])
def test_values_and_gradients(name, activation, save):
    mlp = MLP(DIVISIONS[name], activation=activation, save=save)
    y, expected = mlp(), mlp.expected()
    assert_near([y], [expected])
    assert_near(mlp.grads(y), mlp.grads(expected))
    with torch.no_grad():
        assert_near([mlp()], [expected])


def test_dropout():
    """Linears have masks of their own."""
    division = DIVISIONS["sums of two"]
    mlp = MLP(division, ps=[(0.5, 0.0, 0.75)[adapter % 3] for adapter in range(len(division.ranks))])
    torch.manual_seed(3)
    y = mlp()
    torch.manual_seed(3)
    expected = mlp.expected([torch.randint(2**62, ()) for _ in range(3)])
    assert_near([y], [expected])
    assert_near(mlp.grads(y), mlp.grads(expected))


def test_second_derivatives():
    mlp = MLP(SMALL)
    assert torch.autograd.gradgradcheck(lambda *_: mlp(), mlp.inputs[:4], fast_mode=True)


def test_forward_derivatives_and_torch_func():
    mlp, tangent = MLP(SMALL), torch.randn(8 + 2, K, dtype=torch.float64)
    routed = [linear.routed() for linear in mlp.linears]

    def by_rows(x):
        mlp.x = x
        return mlp.expected()

    x = mlp.x.detach()
    _, got = torch.func.jvp(lambda x: lora_segments_mlp(x, *routed), (x,), (tangent,))
    _, want = torch.func.jvp(by_rows, (x,), (tangent,))
    assert_near([got], [want])


def test_a_factor_that_changes_before_the_backward_pass_is_torchs_own_error():
    mlp = MLP(SMALL)
    y = mlp()
    with torch.no_grad():
        mlp.linears[2].factors[1][0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mlp.grads(y)


def test_sequences():
    mlp = MLP(SMALL)
    want, x = mlp.expected(), mlp.x
    mlp.x = x.detach().view(2, 5, K).requires_grad_()
    y = mlp()
    assert y.shape == (2, 5, N)
    assert_near([y.view(10, N)], [want])
    (dx,) = torch.autograd.grad(y, mlp.x, mlp.dy.view(y.shape))
    assert_near([dx.view(10, K)], torch.autograd.grad(want, x, mlp.dy))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_compiled():
    torch._dynamo.reset()
    mlp = MLP(SMALL)
    fixed, plan = [linear.routed() for linear in mlp.linears], mlp.linears[0].plan
    of = segments.constants(plan, torch.device("cpu"))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(x, ends):
        found = segments.tables(plan, of, ends, len(x))
        return lora_segments_mlp(x, *(each._replace(tables=found) for each in fixed))

    for counts in ((3, 2, 2, 0, 2), (0, 4, 1, 4, 1)):
        division = Division(SMALL.ranks, tuple(zip((1, None, 0, 2, 1), counts, strict=True)), behind=10 - sum(counts))
        for linear in mlp.linears:
            linear.division = division
        y, expected = run(mlp.x, division.ends()), mlp.expected()
        assert_near([y], [expected])
        assert_near(mlp.grads(y), mlp.grads(expected))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("options", "words"), [
    ({"activation": "relu"}, "activation must be one of silu, gelu_tanh"),
    ({"save": "none"}, "save must be one of all, less"),
])  # fmt: skip
def test_errors(options, words):
    mlp = MLP(SMALL)
    mlp.options |= options
    with pytest.raises(ValueError, match=words):
        mlp()


def test_no_rows():
    mlp = MLP(Division((3, 20), ((0, 0), (1, 0))))
    y = mlp()
    assert y.shape == (0, N)
    assert all((grad == 0).all() for grad in mlp.grads(y))


def test_factors_of_several_dtypes_are_not_one_launch(monkeypatch):
    """Gradients of one launch have one dtype."""
    monkeypatch.setattr(choices, "choose_segments", lambda *_: backends.Choice("cuda", ""))
    monkeypatch.setattr(choices, "gated_segments_obstacle", lambda *_: None)
    mlp = MLP(SMALL, torch.float32)
    routed = [linear.routed() for linear in mlp.linears]
    assert obstacle(torch.device("cpu"), torch.bfloat16, routed) is None
    part = routed[2].part
    routed[2] = routed[2]._replace(part=part._replace(A=part.A.bfloat16(), B=part.B.bfloat16()))
    assert obstacle(torch.device("cpu"), torch.bfloat16, routed) == "their factors have dtypes of their own"


def test_layers_that_do_not_fit_together():
    mlp = MLP(SMALL)
    gate, up, down = (linear.routed() for linear in mlp.linears)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got list"):
        lora_segments_mlp([1.0], gate, up, down)
    with pytest.raises(ValueError, match="down: x must have 40 as its last dimension"):
        lora_segments_mlp(mlp.x, gate, up, up)
    with pytest.raises(ValueError, match="gate: x must have 24 as its last dimension"):
        lora_segments_mlp(mlp.x, down, up, down)
    other = MLP(Division(SMALL.ranks, SMALL.segments, behind=600))
    with pytest.raises(ValueError, match="up: tables must be of x's 10 rows"):
        lora_segments_mlp(mlp.x, gate, other.linears[1].routed(), down)


class OnHopper:
    """In 16 bits, and by the formula in float64, and rounded where tensors are."""

    def __init__(self, division, K, wide, N, dtype, activation, save="all", lora_dtype=None, scale=1.0):
        generator = torch.Generator("cuda").manual_seed(0)
        of = (dtype, lora_dtype or dtype, scale, generator, False)
        sizes = ((K, wide), (K, wide), (wide, N))
        self.linears = [segments_problem.Linear(division, *size, *of) for size in sizes]
        self.x = torch.randn(division.M, K, generator=generator, device="cuda").to(dtype).requires_grad_()
        self.dy = torch.randn(division.M, N, generator=generator, device="cuda").to(dtype)
        self.activation, self.save = activation, save
        self.routed = [linear.routed() for linear in self.linears]
        assert obstacle(self.x.device, dtype, self.routed) is None

    @property
    def factors(self):
        return [factor for each in self.routed for adapter in each.adapters for factor in (adapter.A, adapter.B)]

    def run(self):
        y = lora_segments_mlp(self.x, *self.routed, activation=self.activation, save=self.save)
        return [y, *torch.autograd.grad(y, [self.x, *(each.bias for each in self.linears), *self.factors], self.dy)]

    def by_formula(self, dtype):
        """Computed in float64; what is a tensor in 16 bits, its gradient too, is rounded to this dtype."""
        wide = lambda tensor: tensor.detach().double().requires_grad_()  # noqa: E731
        rounded = lambda tensor: tensor.to(dtype).double()  # noqa: E731
        x, biases = wide(self.x), [wide(linear.bias) for linear in self.linears]
        factors = [wide(factor.to(self.x.dtype)) for factor in self.factors]
        pairs = iter(zip(factors[::2], factors[1::2], strict=True))

        def linear(i, x):
            of, y = self.linears[i], x @ self.linears[i].weight.double().T + biases[i]
            for adapter in of.division.begins():
                (A, B), scale = next(pairs), of.scales[of.places[adapter].rank // 16].double()
                own = torch.tensor([[adapter in each] for each in of.division.adapters], device="cuda")
                y = y + rounded(torch.where(own, x, 0) @ A.T * scale) @ B.T
            return rounded(y)

        hidden = rounded(ACTS[self.activation](linear(0, x)) * linear(1, x))
        y = linear(2, hidden)
        grads = torch.autograd.grad(y, [x, *biases, *factors], self.dy.double())
        return [rounded(each.detach()) for each in (y, *grads)]

    def check(self):
        got, exact, rounded = self.run(), self.by_formula(torch.float64), self.by_formula(self.x.dtype)
        for i, (one, other, torchs) in enumerate(zip(got, exact, rounded, strict=True)):
            segments_problem.assert_near(f"result {i}", one, other, torchs, self.x.dtype)
        for _ in range(3):
            assert all(map(torch.equal, got, self.run()))


@pytest.mark.gpu
@pytest.mark.usefixtures("on_hopper")
class TestOnHopper:
    @pytest.fixture(autouse=True)
    def _poisoned(self):
        if (reason := choices.gated_segments_obstacle(torch.device("cuda", 0), 64, False)) is not None:
            pytest.skip(reason)
        pools = [torch.full((n,), float("nan"), device="cuda") for n in (10**8, 10**7, 10**6, 10**5, 10**4)]
        del pools

    @pytest.mark.parametrize("save", ["all", "less"])
    @pytest.mark.parametrize("activation", ACTS)
    @pytest.mark.parametrize("name", ["mixed", "odd", "sums of two", "without adapters in between", "rows behind"])
    def test_divisions(self, name, activation, save):
        OnHopper(DIVISIONS[name], 320, 456, 264, torch.bfloat16, activation, save).check()

    @pytest.mark.parametrize(("K", "wide", "N"), [(8, 8, 8), (100, 72, 136), (63, 65, 33), (128, 2048, 128)])
    def test_sizes(self, K, wide, N):
        OnHopper(DIVISIONS["mixed"], K, wide, N, torch.bfloat16, "silu").check()

    @pytest.mark.parametrize("name", ["mixed", "odd"])
    @pytest.mark.parametrize(("dtype", "lora_dtype", "scale"), [
        (torch.float16, None, 1.0), (torch.float16, None, 300.0), (torch.bfloat16, torch.float32, 1.0),
    ])  # fmt: skip
    def test_dtypes(self, name, dtype, lora_dtype, scale):
        OnHopper(DIVISIONS[name], 320, 456, 264, dtype, "silu", "all", lora_dtype, scale).check()

    def test_many_rows(self):
        division = Division((8, 16, 24, 32, 48, 64, 96, 128), tuple((i, 700) for i in range(8)))
        OnHopper(division, 1024, 1536, 768, torch.bfloat16, "silu").check()

    def test_without_gradients(self):
        """Also up to 64 rows, of which down has kernels of their own."""
        for count in (9, 300):
            mlp = OnHopper(Division((16, 40), ((0, count), (1, count))), 256, 512, 256, torch.bfloat16, "silu")
            want = mlp.run()[0]
            with torch.no_grad():
                y = lora_segments_mlp(mlp.x, *mlp.routed)
            segments_problem.assert_near("y", y, mlp.by_formula(torch.float64)[0], want, torch.bfloat16)

    def test_windows_above_128_are_computed_one_by_one(self):
        linears = [
            segments_problem.Linear(
                DIVISIONS["the largest"], *size, torch.bfloat16, torch.bfloat16, 1.0, torch.Generator("cuda"), False
            )
            for size in ((64, 72), (64, 72), (72, 64))
        ]
        found = obstacle(torch.device("cuda"), torch.bfloat16, [linear.routed() for linear in linears])
        assert "256 is above 128" in found
