"""csrc's kernels for Hopper: every tile, every order of work, every part of the results, the same bits each time."""

import pytest
import torch
import torch.utils.checkpoint

from fused_lora import backends, choices, lora_linear
from fused_lora.reference import keep_mask, lora_linear_ref
from tests.accuracy import assert_accurate
from tests.ops.problem import SCALE, SEED, cast, make_dy, make_inputs, run, seed_on, solve, unfused
from tests.ops.test_lora_linear_cuda import assert_same, capture

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("on_hopper")]
DTYPES = [torch.bfloat16, torch.float16]


def solve_in_csrc(M, K, N, r, dtype=torch.bfloat16, **options):
    inputs = make_inputs(M, K, N, r, "cuda", dtype, **options)
    assert backends.choose_lora_linear(inputs["x"].device, dtype, r).name == "cuda"
    return solve(inputs, make_dy(inputs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 5, 8, 16, 17, 40, 64, 65, 100, 128, 130, 256])
def test_ranks(r, dtype):
    solve_in_csrc(333, 264, 392, r, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(1, 8, 8), (127, 72, 136), (129, 1032, 264), (256, 64, 2048), (2049, 520, 1000)], ids=str
)
def test_sizes(size, dtype):
    solve_in_csrc(*size, 24, dtype)


# By kernels for few rows: each of their sizes, a depth and columns that end within a box, more depth than stages, few
# columns and many.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 16, 17, 33, 64])
@pytest.mark.parametrize(("K", "N", "r"), [
    (72, 136, 16), (4104, 1032, 8), (264, 8, 8), (8, 264, 8), (8200, 392, 24), (200, 20000, 64), (1024, 16384, 256),
    (2048, 256, 16),
])  # fmt: skip
def test_few_rows(M, K, N, r, dtype):
    if dtype is torch.bfloat16:
        is_own = choices.way(torch.device("cuda:0"), dtype, M, K, N, r, 0.0, False) == "few rows"
        assert is_own == (M * r <= max(N, 2**22 // K))
    inputs = make_inputs(M, K, N, r, "cuda", dtype)
    scale = torch.tensor(SCALE, device="cuda")
    with torch.no_grad():  # gradients of few rows are few roundings
        y, by_torch = (function(**inputs, scale=scale) for function in (lora_linear, unfused))
        exact = lora_linear_ref(**cast(inputs, torch.float64), scale=scale.double())
    assert_accurate("y", y, exact, by_torch, roundings=2)


def test_few_rows_in_a_graph():
    inputs = make_inputs(48, 520, 1032, 16, "cuda", torch.bfloat16)
    scale = torch.tensor(SCALE, device="cuda")
    with torch.no_grad():
        want = lora_linear(**inputs, scale=scale)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden = lora_linear(**inputs, scale=scale)
            y = hidden + lora_linear(**inputs, scale=scale)
        for _ in range(20):
            y.fill_(float("nan"))
            hidden.fill_(float("nan"))
            graph.replay()
            assert torch.equal(hidden, want)
            assert torch.equal(y, want + want)


# Rows that start anywhere: of x and the weight, of dy, y and dx, of all; one entry; a tile's last column alone.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "K", "N", "r"), [
    (333, 265, 392, 24), (333, 264, 391, 24), (2500, 1037, 523, 16), (1, 1, 1, 1), (129, 7, 257, 5),
    (5000, 257, 513, 128), (4100, 3079, 521, 200), (9000, 321, 135, 16), (4096, 683, 256, 64), (700, 5461, 2736, 128),
    (300, 151, 50257, 16), (300, 50257, 151, 40), (700, 8191, 151, 128), (700, 151, 8191, 64),
])  # fmt: skip
def test_any_width(M, K, N, r, dtype):
    solve_in_csrc(M, K, N, r, dtype)


@pytest.mark.parametrize(("M", "K", "N", "r"), [(333, 265, 391, 40), (5000, 1037, 523, 16), (2500, 267, 129, 200)])
def test_any_width_with_dropout(M, K, N, r):
    inputs = make_inputs(M, K, N, r, "cuda", torch.bfloat16)
    solve(inputs, make_dy(inputs), p=0.3, seed=seed_on("cuda"))


# Several groups or slices of rows, so that sums over tokens are chained; r = 16 into few columns rides; few tiles are
# narrow.
@pytest.mark.parametrize(("M", "K", "N", "r"), [
    (9000, 320, 136, 16), (9000, 136, 320, 16), (20000, 264, 1024, 9), (6000, 512, 256, 64), (5000, 512, 1024, 200),
    (4100, 3080, 520, 128), (4096, 1024, 4096, 16), (1000, 520, 264, 24), (2048, 264, 512, 128),
])  # fmt: skip
def test_many_rows(M, K, N, r):
    solve_in_csrc(M, K, N, r)


# Narrow and wide tiles, every rank's kernel, several groups and slices, one that would ride without dropout.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
@pytest.mark.parametrize(("M", "K", "N", "r"), [
    (333, 264, 392, 5), (333, 264, 392, 65), (5000, 2056, 1032, 16), (9000, 320, 136, 16), (4100, 1032, 520, 128),
    (4100, 520, 1032, 40), (2500, 264, 392, 200), (9000, 136, 320, 128), (9000, 320, 136, 40),
])  # fmt: skip
def test_dropout(M, K, N, r, p, dtype):
    inputs = make_inputs(M, K, N, r, "cuda", dtype)
    solve(inputs, make_dy(inputs), p=p, seed=seed_on("cuda"))


@pytest.mark.parametrize("p", [1e-12, 0.5, 31 / 32, 63 / 64])
@pytest.mark.parametrize("seed", [7, -3, SEED])
def test_the_mask_bit_for_bit(seed, p):
    """With W = 0, A the identity and ones in B, dx is the mask where one entry of dy is 1."""
    M, K = 70000, 128
    zeros = {"device": "cuda", "dtype": torch.bfloat16}
    inputs = {
        "x": torch.ones(M, K, **zeros).requires_grad_(), "weight": torch.zeros(8, K, **zeros),
        "A": torch.eye(K, **zeros), "B": torch.ones(8, K, **zeros),
    }  # fmt: skip
    dy = torch.zeros(M, 8, **zeros)
    dy[:, 3] = 1
    seed = seed_on("cuda", seed)
    got = run(lora_linear, inputs, dy, scale=torch.tensor(1.0, device="cuda"), p=p, seed=seed)
    kept = keep_mask(M, K, p, seed)
    assert torch.equal(got["dx"] != 0, kept)
    assert torch.equal(got["y"][:, 0], (kept.sum(1) / (1 - p)).bfloat16())


def test_dropout_draws_a_seed_as_other_backends_do():
    inputs = make_inputs(300, 264, 136, 12, "cuda", torch.bfloat16)
    scale = torch.tensor(SCALE, device="cuda")
    torch.manual_seed(5)
    y = lora_linear(**inputs, scale=scale, p=0.5)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (), dtype=torch.int64, device="cuda")
    assert torch.equal(y, lora_linear(**inputs, scale=scale, p=0.5, seed=seed))
    assert not torch.equal(y, lora_linear(**inputs, scale=scale, p=0.5))


@pytest.mark.parametrize(("p", "seed", "error"), [
    (1.5, None, "p must be"), (-0.1, None, "p must be"), (True, None, "p must be"), (10**400, None, "p must be"),
    (0.5, torch.tensor(1), "seed"), (0.5, torch.ones(()), "seed"),
])  # fmt: skip
def test_a_wrong_dropout_is_named(p, seed, error):
    inputs = make_inputs(20, 64, 64, 8, "cuda", torch.bfloat16)
    with pytest.raises((ValueError, TypeError), match=error):
        lora_linear(**inputs, scale=torch.tensor(SCALE, device="cuda"), p=p, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [3, 16, 96])
def test_float32_factors(r, dtype):
    got = solve_in_csrc(2500, 264, 392, r, dtype, lora_dtype=torch.float32)
    assert got["dA"].dtype == got["dB"].dtype == torch.float32


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("M", "r"), [(300, 16), (9000, 128)])
def test_the_gradient_of_a_bias_is_summed_in_float32(M, r, bias_dtype):
    inputs = make_inputs(M, 136, 392, r, "cuda", torch.bfloat16)
    inputs["bias"] = inputs["bias"].detach().to(bias_dtype).requires_grad_()
    dy = make_dy(inputs)
    got = run(lora_linear, inputs, dy, scale=torch.tensor(SCALE, device="cuda"))["dbias"]
    exact = dy.double().sum(0)
    assert got.dtype is bias_dtype
    bound = 2**-8 if bias_dtype is torch.bfloat16 else 1e-5
    assert (got.double() - exact).abs().max() < bound * exact.abs().max()


# M = 300 ends in the first half of its last 256 rows.
@pytest.mark.parametrize(("M", "r"), [(2500, 8), (2500, 128), (300, 16)])
@pytest.mark.parametrize("needed", [("x",), ("A",), ("B",), ("A", "B"), ("x", "B"), ("x", "A"), ("bias",)], ids=str)
def test_any_part_of_the_gradients(needed, M, r):
    inputs = make_inputs(M, 264, 392, r, "cuda", torch.bfloat16)
    for name in ("x", "A", "B", "bias"):
        inputs[name] = inputs[name].detach().requires_grad_(name in needed)
    got = solve(inputs, make_dy(inputs))
    assert set(got) == {"y", *(f"d{name}" for name in needed)}


@pytest.mark.parametrize("needed", [("bias",), ("x", "A", "B"), ("B", "bias")], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_any_part_of_the_gradients_with_dropout(needed, bias):
    inputs = make_inputs(9000, 136, 320, 16, "cuda", torch.bfloat16, torch.float32, bias=bias)
    for name in inputs.keys() - {"weight"}:
        inputs[name] = inputs[name].detach().requires_grad_(name in needed)
    if any(t.requires_grad for t in inputs.values()):
        got = solve(inputs, make_dy(inputs), p=0.25, seed=seed_on("cuda"))
        assert set(got) == {"y", *(f"d{name}" for name in needed if name in inputs)}


def checkpointed(x, **arguments):  # whose generators are kept for the devices of what is passed by position
    return torch.utils.checkpoint.checkpoint(lambda x: lora_linear(x, **arguments), x, use_reentrant=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_compiled_and_checkpointed_as_eager(p):
    inputs = make_inputs(300, 72, 136, 12, "cuda", torch.bfloat16)
    dy, options = make_dy(inputs), {"scale": torch.tensor(SCALE, device="cuda"), "p": p, "seed": seed_on("cuda")}
    want = run(lora_linear, inputs, dy, **options)
    assert_same(run(torch.compile(lora_linear, fullgraph=True), inputs, dy, **options), want)
    assert_same(run(checkpointed, inputs, dy, **options), want)
    with torch.no_grad():
        assert torch.equal(lora_linear(**inputs, **options), want["y"])
    with torch.inference_mode():
        assert torch.equal(lora_linear(**inputs, **options), want["y"])


def test_a_drawn_mask_is_drawn_again_by_a_checkpoint():
    inputs = make_inputs(300, 128, 136, 12, "cuda", torch.bfloat16)
    dy, scale = make_dy(inputs), torch.tensor(SCALE, device="cuda")
    results = []
    for function in (lora_linear, checkpointed):
        torch.manual_seed(3)
        results.append(run(function, inputs, dy, scale=scale, p=0.5))
    assert_same(*results)


def test_what_the_copy_engine_cannot_read_is_copied():
    """Rows of x and dy that do not start at 16 bytes, and factors that do not."""
    inputs = make_inputs(300, 264, 136, 12, "cuda", torch.bfloat16)
    dy = make_dy(inputs)
    want = run(lora_linear, inputs, dy, scale=SCALE)
    wide = torch.full((300, 267), float("nan"), device="cuda", dtype=torch.bfloat16)
    wide[:, 1:265] = inputs["x"].detach()
    odd = inputs | {"x": wide[:, 1:265].requires_grad_()}
    odd["A"] = torch.cat([inputs["A"].detach()[:, :1], inputs["A"].detach()], 1)[:, 1:].requires_grad_()
    assert_same(run(lora_linear, odd, dy.T.contiguous().T, scale=SCALE), want)


def test_empty_results():
    scale = torch.tensor(SCALE, device="cuda")
    inputs = {name: t.detach() for name, t in make_inputs(20, 64, 0, 8, "cuda", torch.bfloat16).items()}
    assert lora_linear(**inputs, scale=scale).shape == (20, 0)
    inputs = {name: t.detach() for name, t in make_inputs(20, 64, 64, 8, "cuda", torch.bfloat16).items()}
    with pytest.raises(ValueError, match="r must be between"):
        lora_linear(**inputs | {"A": inputs["A"][:0], "B": inputs["B"][:, :0]}, scale=scale)


@pytest.mark.parametrize("load", [False, True], ids=["idle", "loaded"])
@pytest.mark.parametrize(("M", "K", "N", "r", "p"), [
    (4096, 1024, 1024, 128, 0.0), (5000, 264, 520, 16, 0.0), (700, 2048, 512, 5, 0.0), (5000, 264, 520, 16, 0.5),
])  # fmt: skip
def test_the_same_bits_200_times(M, K, N, r, p, load):
    inputs = make_inputs(M, K, N, r, "cuda", torch.bfloat16)
    dy, options = make_dy(inputs), {"scale": torch.tensor(SCALE, device="cuda"), "p": p, "seed": seed_on("cuda")}
    first = run(lora_linear, inputs, dy, **options)
    beside, work = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    for _ in range(200):
        if load:
            with torch.cuda.stream(beside):
                work @ work
        got = run(lora_linear, inputs, dy, **options)
        assert all(torch.equal(got[name], value) for name, value in first.items())


def test_graphs_replayed_beside_each_other():
    """Each captured launch has flags of its own."""
    scale = torch.tensor(SCALE, device="cuda")
    problems = []
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = make_inputs(3000, 264, 520, 16, "cuda", torch.bfloat16)
        dy = make_dy(inputs)
        want = run(lora_linear, inputs, dy, scale=scale)
        graph, results = capture(lambda inputs=inputs, dy=dy: run(lora_linear, inputs, dy, scale=scale))
        problems.append((graph, results, want, inputs, dy))  # a graph reads its inputs' memory and does not keep it
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(20):
        torch.cuda.synchronize()
        for stream, (graph, results, *_) in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                for result in results.values():
                    result.fill_(float("nan"))
                graph.replay()
        torch.cuda.synchronize()
        for _, results, want, *_ in problems:
            assert_same(results, want)


def test_a_merge_between_forward_and_backward_raises():
    inputs = make_inputs(64, 64, 64, 8, "cuda", torch.bfloat16)
    y = lora_linear(**inputs, scale=torch.tensor(SCALE, device="cuda"))
    torch.autograd.graph.increment_version(inputs["weight"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
