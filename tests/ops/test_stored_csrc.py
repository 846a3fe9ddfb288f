"""csrc's kernels over weights in a format: results are those over plain weights of the same values, bit for bit; through
rings that are used many times, and beside all else that kernels do."""

import gc

import pytest
import torch

from fused_lora import backends, choices
from fused_lora.formats import FP8, INT8, NF4, dequantise
from fused_lora.ops import Part, lora_group, lora_linear, lora_mlp
from tests.ops.problem import SCALE, randn, seed_on
from tests.ops.segments_problem import Problem
from tests.segments.divisions import DIVISIONS, Division

FORMATS = [NF4(), NF4(nested=True), INT8(), FP8("rows"), FP8("blocks"), FP8("tensor")]
# M, K, N, r: one column of tiles, some, more than a ring holds; depths and widths that no kernel likes.
SHAPES = [
    (70, 64, 128, 4), (300, 520, 1000, 40), (1000, 1024, 4096, 16), (2100, 2048, 1032, 128), (513, 1500, 5461, 200),
    (130, 63, 65, 3), (8200, 512, 768, 64),
]  # fmt: skip
every_format = pytest.mark.parametrize("form", FORMATS, ids=str)
bfloat16 = {"device": "cuda", "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def _on_hopper(on_hopper):
    if not choices.csrc_dequantises(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("csrc has no formats for this card")
    with backends.forcing("cuda"):
        yield


pytestmark = pytest.mark.gpu


def poison():
    """What is allocated next holds NaN where it is not written."""
    pools = [torch.full((n,), float("nan"), device="cuda") for n in (10**8, 10**7, 10**6, 10**5, 10**4)]
    del pools


def part_of(K, N, r, form, **options):
    """(a part over a weight in a format, one over the weight that it stands for)."""
    options = bfloat16 | options
    stored = form.quantise(randn(N, K, std=K**-0.5, **options))
    A, B = (randn(*sizes, std=sizes[1] ** -0.5, **options).requires_grad_() for sizes in ((r, K), (N, r)))
    part = Part(stored, A, B, randn(N, **options).requires_grad_(), SCALE)
    return part, part._replace(weight=dequantise(stored, options["dtype"]))


def results(function, x, parts, dys=None):
    """The results of function(x, parts) and their gradients of x and of all factors and biases."""
    poison()
    ys = function(x, parts)
    dys = dys or [randn(*y.shape, device="cuda", dtype=y.dtype) for y in ys]
    wanted = [x, *(tensor for part in parts for tensor in (part.A, part.B, part.bias) if tensor is not None)]
    return [*ys, *torch.autograd.grad(ys, wanted, dys)], dys


def assert_same_bits(function, x, stored, plain):
    got, dys = results(function, x, stored)
    want, _ = results(function, x, plain, dys)
    for i, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.isfinite().all(), i
        assert torch.equal(one, other), i


@every_format
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linears(dtype, shape, form):
    M, K, N, r = shape
    # Fewer ranks may ride on a plain weight's tiles, and are then summed in another order.
    stored, plain = part_of(K, N, max(r, 17), form, dtype=dtype)
    x = randn(M, K, device="cuda", dtype=dtype).requires_grad_()
    assert_same_bits(lambda x, parts: [lora_linear(x, *parts[0][:5])], x, [stored], [plain])


@every_format
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout(p, form):
    stored, plain = part_of(1000, 2072, 40, form)
    x = randn(700, 1000, **bfloat16).requires_grad_()
    seed = seed_on("cuda")
    assert_same_bits(lambda x, parts: [lora_linear(x, *parts[0][:5], p, seed)], x, [stored], [plain])


@pytest.mark.parametrize("form", [NF4(), FP8("blocks")], ids=str)
def test_a_gain(form):
    """Backward a plain weight may be multiplied by it, and dy otherwise: forward alone has the same bits."""
    (stored, plain), gain = part_of(520, 1032, 40, form), torch.rand(1032, device="cuda") + 0.5
    x = randn(300, 520, **bfloat16)
    with torch.no_grad():
        one, other = (lora_linear(x, *part[:5], gain=gain) for part in (stored, plain))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "forms", [(NF4(), INT8(), FP8()), (NF4(), None, FP8("blocks")), (None, None, NF4(nested=True))]
)
@pytest.mark.parametrize(
    "shape", [(600, 1024, (2048, 512, 520)), (333, 200, (264, 96, 130)), (2050, 3100, (700, 700, 300))]
)
def test_groups(shape, forms):
    """Of several formats, and with plain weights among them."""
    M, K, Ns = shape
    pairs = [part_of(K, N, 17 + 20 * i, form or INT8()) for i, (N, form) in enumerate(zip(Ns, forms, strict=True))]
    plain = [of for _, of in pairs]
    stored = [of if form else other for (of, other), form in zip(pairs, forms, strict=True)]
    assert_same_bits(lambda x, parts: lora_group(x, parts), randn(M, K, **bfloat16).requires_grad_(), stored, plain)


@every_format
@pytest.mark.parametrize("shape", [(600, 1024, 2816), (333, 200, 520), (2050, 768, 1000)])
@pytest.mark.parametrize("save", ["all", "less"])
def test_gated_mlps(save, shape, form):
    M, K, F = shape
    pairs = [part_of(*sizes, 20 + i, form) for i, sizes in enumerate(((K, F), (K, F), (F, K)))]
    stored, plain = zip(*pairs, strict=True)
    mlp = lambda x, parts: [lora_mlp(x, *parts, save=save)]  # noqa: E731
    assert_same_bits(mlp, randn(M, K, **bfloat16).requires_grad_(), stored, plain)


MANY = Division((16,) * 8, tuple((i, 300 + i) for i in range(8)))


@every_format
@pytest.mark.parametrize("division", [DIVISIONS["mixed"], DIVISIONS["odd"], MANY], ids=["mixed", "odd", "many"])
@pytest.mark.parametrize("drops", [False, True])
def test_rows_with_adapters_of_their_own(drops, division, form):
    problem, found = Problem(division, 520, (1032,), drops=drops), []
    stored = form.quantise(problem.linears[0].weight)
    for weight in (stored, dequantise(stored, torch.bfloat16)):
        poison()
        problem.linears[0].weight = weight
        found.append(problem.run())
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@every_format
def test_a_hundred_times(form):
    """An error that moves from run to run would be a race for a place in the ring."""
    stored, _ = part_of(1024, 4096, 64, form)
    x = randn(3000, 1024, **bfloat16).requires_grad_()
    linear = lambda x, parts: [lora_linear(x, *parts[0][:5])]  # noqa: E731
    first, dys = results(linear, x, [stored])
    for _ in range(100):
        again, _ = results(linear, x, [stored], dys)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("form", [NF4(), INT8(), FP8()], ids=str)
def test_in_a_graph(form):
    stored, plain = part_of(1024, 4096, 64, form)
    x = randn(1500, 1024, **bfloat16)
    with torch.no_grad():
        lora_linear(x, *stored[:5])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lora_linear(x, *stored[:5])
        for _ in range(3):
            x.normal_()
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, lora_linear(x, *plain[:5]))


@pytest.mark.parametrize("form", [NF4(), INT8(), FP8()], ids=str)
@pytest.mark.parametrize("shape", [(512, 4096, 4096), (512, 1024, 14336), (512, 14336, 1024), (512, 8192, 8192)])
def test_no_whole_weight_is_ever_in_memory(shape, form):
    """Beside results and what is saved there is a ring of at most three quarters of W, or of 64 MiB and a column."""
    M, K, N = shape
    stored, _ = part_of(K, N, 64, form)
    x = randn(M, K, **bfloat16).requires_grad_()
    dy = randn(M, N, **bfloat16)
    gc.collect()
    ring = min(3 * N * K // 4, 2**25) * 2 + 2 * 256 * max(N, K) * 2
    own = 3 * 2 * M * (K + N) + 16 * 64 * (K + N)
    for step in (lambda: lora_linear(x, *stored[:5]), lambda: lora_linear(x, *stored[:5]).backward(dy)):
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < ring + own
        assert peak < 2 * N * K + own
