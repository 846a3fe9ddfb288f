"""csrc's kernels for rows with adapters of their own, against the formula in float64."""

import pytest
import torch

from fused_lora import choices, segments
from fused_lora.ops import lora_segments, segmented
from tests.ops.segments_problem import Problem, check, check_graph
from tests.segments.divisions import DIVISIONS, Division

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


@pytest.fixture
def _drops():
    """Which csrc/sm90 alone has."""
    if choices.choose_segments(torch.device("cuda", 0), torch.bfloat16, 64, True, True).name != "cuda":
        pytest.skip("csrc has no dropout for this card")


@pytest.mark.usefixtures("_drops")
class TestDropout:
    """Of a linear's own mask and adapters' own thresholds; each level has another mask."""

    @pytest.mark.parametrize(("K", "Ns"), SIZES)
    @pytest.mark.parametrize("name", [name for name in DIVISIONS if name != "nothing but rows behind"])
    def test_divisions(self, name, K, Ns):
        check(Problem(DIVISIONS[name], K, Ns, drops=True))

    @pytest.mark.parametrize("name", LARGE)
    def test_many_rows(self, name):
        check(Problem(LARGE[name], 1024, (768,), drops=True))

    @pytest.mark.parametrize(("dtype", "lora_dtype", "scale"), [
        (torch.float16, None, 1.0), (torch.float16, None, 300.0), (torch.bfloat16, torch.float32, 1.0),
    ])  # fmt: skip
    def test_dtypes(self, dtype, lora_dtype, scale):
        check(Problem(DIVISIONS["mixed"], 320, (456, 72), dtype, lora_dtype, scale, drops=True))

    @pytest.mark.parametrize(("K", "N"), [(8, 8), (100, 72), (63, 65), (128, 2048)])
    def test_sizes(self, K, N):
        check(Problem(DIVISIONS["mixed"], K, (N,), drops=True))

    def test_what_others_hold_spoils_no_gradient(self):
        """Rows of other adapters in a step of tokens, and rows behind, are no numbers times 0."""
        check_rows_behind(drops=True)


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


def check_rows_behind(drops):
    problem = Problem(DIVISIONS["rows behind"], 256, (256,), drops=drops)
    with torch.no_grad():
        problem.x[150:] = float("nan")
    problem.dys[0][150:] = float("nan")
    y, _, _, *grads = problem.run()
    assert y[:130].isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)


def test_rows_behind_the_last_segment_may_be_anything():
    check_rows_behind(drops=False)


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


@torch.no_grad()
def test_a_row_alone_and_mixed_a_hundred_times():
    """The same bits wherever it lies; within one rounding where either pass has up to 64 rows, which without gradients
    kernels of their own compute."""
    generator, ranks = torch.Generator().manual_seed(0), (16, 24, 64, 8)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    problem = Problem(Division(ranks, tuple((i, 400) for i in range(4))), 512, (520,))
    x, linear = problem.x.detach(), problem.linears[0]
    for _ in range(100):
        counts, which = [draw(1, 100) for _ in range(6)], draw(0, 6)
        own = slice(sum(counts[:which]), sum(counts[: which + 1]))
        mixed = Division(ranks, tuple((i % 4, count) for i, count in enumerate(counts)), behind=draw(0, 40))
        alone = Division(ranks, ((which % 4, counts[which]),))
        y, y_alone = run_divided(linear, mixed, x[: mixed.M])[own], run_divided(linear, alone, x[own])
        if min(mixed.M, alone.M) > 64:
            assert torch.equal(y, y_alone)
        assert (y.float() - y_alone.float()).abs().max() <= 2**-8 * y_alone.float().abs().max()


def run_divided(linear, division, x):
    """A linear with its adapters for other rows."""
    linear.division, linear.plan = division, division.plan()
    of = segments.constants(linear.plan, torch.device("cuda"))
    linear.tables = segments.tables(linear.plan, of, division.ends("cuda"), division.M)
    return lora_segments(x, [linear.routed()])[0]


def test_rows_with_several_adapters_in_float16_are_not_for_csrc():
    problem = Problem(DIVISIONS["sums of two"], 64, (64,), torch.float16)
    routed = problem.linears[0].routed()
    found = segmented.obstacle(problem.x.device, problem.x.dtype, [routed.part], [segmented.of_routed(routed)], False)
    assert "several adapters in float16" in found


def test_one_graph_replays_any_division():
    check_graph("cuda")
