"""The gated MLP as one op: against its three linears and the product in float64, and in torch."""

import pytest
import torch
from torch.nn import functional as F

from fused_lora import reference
from fused_lora.ops import Part, lora_mlp
from fused_lora.reference import lora_linear_ref, lora_mlp_ref
from tests.accuracy import assert_accurate
from tests.ops.problem import PLACES, SCALE, cast, make_inputs, randn, seed_on, unfused

# Dynamo makes an instance of every autograd.Function that it traces; inductor speaks of TensorFloat32.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Function'> should not be instantiated:DeprecationWarning", "ignore:TensorFloat32 tensor cores"
)
NAMES = ("gate", "up", "down")
ACTS = {"silu": F.silu, "gelu_tanh": lambda t: F.gelu(t, approximate="tanh")}


def make_mlp(M, K, F_, N, ranks, device, dtype, bias=True, lora_dtype=None):
    """x, and weight, A, B and bias of gate, up and down."""
    sizes = ((K, F_), (K, F_), (F_, N))
    parts = [
        make_inputs(M, depth, cols, r, device, dtype, lora_dtype, bias)
        for (depth, cols), r in zip(sizes, ranks, strict=True)
    ]
    return parts[0]["x"], [{name: value for name, value in part.items() if name != "x"} for part in parts]


def fused(x, parts, activation, **options):
    scaled = (Part(**part, scale=SCALE * (i + 1)) for i, part in enumerate(parts))
    return lora_mlp(x, *scaled, activation, **options)


def by_formula(linear):
    def run(x, parts, activation, p=0.0, seed=None, save="all"):
        scaled = [{**part, "scale": SCALE * (i + 1)} for i, part in enumerate(parts)]
        if linear is lora_linear_ref:
            return lora_mlp_ref(x, *scaled, ACTS[activation], p, seed)
        gate, up = (linear(x, **part, p=p, seed=seed) for part in scaled[:2])
        down_seed = None if seed is None else seed + reference.DOWN_SEED
        return linear(ACTS[activation](gate) * up, **scaled[2], p=p, seed=down_seed)

    return run


def results(function, x, parts, dy, *args, **options):
    """y, and the gradient of every tensor that requires one, by name."""
    y = function(x, parts, *args, **options)
    wanted = {f"{NAMES[i]}'s {name}": t for i, part in enumerate(parts) for name, t in part.items() if t.requires_grad}
    wanted |= {"x": x} if x.requires_grad else {}
    grads = torch.autograd.grad(y, list(wanted.values()), dy)
    return {"y": y.detach()} | dict(zip(wanted, grads, strict=True))


def check(got, x, parts, dy, *args, **options):
    """Against float64, held to the unfused formula in x's dtype."""
    wide = cast({"x": x}, torch.float64)["x"], [cast(part, torch.float64) for part in parts]
    exact = results(by_formula(lora_linear_ref), *wide, dy.double(), *args, **options)
    by_torch = results(by_formula(unfused), x, parts, dy, *args, **options)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_accurate(name, value, exact[name], by_torch[name], 3, x.dtype)  # of two operands and the result


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("save", ["all", "less"])
@pytest.mark.parametrize("activation", ACTS)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_mlp(device, dtype, activation, save, p):
    x, parts = make_mlp((3, 217), 40, 131, 72, (8, 5, 7), device, dtype)  # enough for a largest error to mean something
    dy = randn(3, 217, 72, device=device, dtype=dtype)
    options = {"p": p, "seed": seed_on(device)} if p else {}
    check(results(fused, x, parts, dy, activation, save=save, **options), x, parts, dy, activation, **options)


# M, K, F, N and ranks: groups of rows and slices of tokens, every rank's kernel, tiles cut off, rows that start
# anywhere, fewer steps than parts that leave, ranks too large for one launch.
WIDE = [
    (333, 264, 392, 264, (24, 24, 24)), (5000, 520, 1032, 520, (128, 128, 128)), (9000, 136, 320, 136, (16, 16, 16)),
    (4100, 523, 1037, 523, (40, 1, 64)), (2500, 264, 392, 264, (200, 24, 16)), (6000, 1032, 2736, 1032, (128, 64, 16)),
    (1, 264, 392, 264, (1, 1, 1)), (4096, 1024, 2731, 1024, (128, 128, 128)), (3000, 64, 5461, 64, (4, 128, 128)),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("M", "K", "F_", "N", "ranks"), WIDE, ids=str)
def test_mlps_of_many_rows(M, K, F_, N, ranks, p):
    x, parts = make_mlp(M, K, F_, N, ranks, "cuda", torch.bfloat16)
    dy = randn(M, N, device="cuda", dtype=torch.bfloat16)
    options = {"p": p, "seed": seed_on("cuda")} if p else {}
    for save in ("all", "less"):
        check(results(fused, x, parts, dy, "silu", save=save, **options), x, parts, dy, "silu", **options)


@pytest.mark.gpu
def test_the_same_bits_each_time():
    x, parts = make_mlp(9000, 520, 1037, 520, (128, 64, 16), "cuda", torch.bfloat16)
    dy = randn(9000, 520, device="cuda", dtype=torch.bfloat16)
    for save in ("all", "less"):
        first = results(fused, x, parts, dy, "silu", save=save)
        for _ in range(3):
            for name, value in results(fused, x, parts, dy, "silu", save=save).items():
                assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("frozen", ["x", "A", "B", "bias"])
def test_only_what_is_wanted(frozen, device):
    x, parts = make_mlp(300, 64, 136, 72, (8, 8, 8), device, torch.bfloat16)
    dy = randn(300, 72, device=device, dtype=torch.bfloat16)
    wholes = {save: results(fused, x, parts, dy, "silu", save=save) for save in ("all", "less")}
    for tensor in [x] if frozen == "x" else [part[frozen] for part in parts]:
        tensor.requires_grad_(False)
    for save, whole in wholes.items():
        for name, value in results(fused, x, parts, dy, "silu", save=save).items():
            assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_without_gradients_the_values_are_the_same(device):
    x, parts = make_mlp(300, 64, 131, 72, (8, 8, 8), device, torch.bfloat16)
    expected = fused(x, parts, "silu").detach()
    with torch.no_grad():
        assert torch.equal(fused(x, parts, "silu"), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_zeros_and_far_values_stay_finite(device):
    x, parts = make_mlp(256, 64, 136, 64, (8, 8, 8), device, torch.bfloat16)
    with torch.no_grad():
        x[:128] = 0
        x[128:] *= 1e4
    for activation in ACTS:
        for name, value in results(fused, x, parts, torch.ones_like(x), activation).items():
            assert value.isfinite().all(), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("save", ["all", "less"])
def test_gates_whose_square_is_infinite(device, save):
    x, parts = make_mlp(256, 64, 136, 64, (8, 8, 8), device, torch.bfloat16)
    with torch.no_grad():
        parts[0]["weight"] *= 1e20  # gates of either sign
    for name, value in results(fused, x, parts, torch.ones_like(x), "gelu_tanh", save=save).items():
        assert value.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_whole(dtype):
    x, parts = make_mlp(48, 40, 51, 24, (8, 5, 7), "cpu", dtype)
    dy = randn(48, 24, device="cpu", dtype=dtype)
    expected = results(fused, x, parts, dy, "silu", save="less")
    compiled = torch.compile(lambda x, parts: fused(x, parts, "silu", save="less"), fullgraph=True)
    for name, value in results(lambda x, parts: compiled(x, parts), x, parts, dy).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.gpu
def test_compiled_whole_on_a_gpu():
    x, parts = make_mlp(512, 256, 387, 256, (8, 16, 8), "cuda", torch.bfloat16)
    dy = randn(512, 256, device="cuda", dtype=torch.bfloat16)
    expected = results(fused, x, parts, dy, "silu")
    compiled = torch.compile(lambda x, parts: fused(x, parts, "silu"), fullgraph=True)
    for name, value in results(lambda x, parts: compiled(x, parts), x, parts, dy).items():
        assert torch.equal(value, expected[name]), name


def test_autocast_computes_in_its_dtype():
    x, parts = make_mlp(16, 8, 12, 8, (4, 4, 4), "cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x, parts, "silu")
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), fused(x, parts, "silu"), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation must be one of silu, gelu_tanh, got 'relu'"),
        ({"save": "none"}, "save must be one of all, less, got 'none'"),
        ({"down": "gate"}, "down: x must have 8 as its last dimension"),
        ({"up": "down"}, "up: x must have 12 as its last dimension"),
        ({"A": 2}, "down: A must have shape"),
    ],
)
def test_errors_name_the_argument(change, message):
    x, parts = make_mlp(16, 8, 12, 8, (4, 4, 4), "cpu", torch.float32)
    arguments = {name: Part(**part) for name, part in zip(NAMES, parts, strict=True)}
    if "A" in change:
        arguments["down"] = arguments["down"]._replace(A=arguments["gate"].A)
    else:
        arguments |= {name: arguments.get(value, value) for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        lora_mlp(x, **arguments)


def test_gate_and_up_are_of_one_width():
    x, parts = make_mlp(16, 8, 12, 8, (4, 4, 4), "cpu", torch.float32)
    up = make_inputs(16, 8, 11, 4)
    with pytest.raises(ValueError, match="up: weight must have 12 rows like gate's, got 11"):
        lora_mlp(x, Part(**parts[0]), Part(up["weight"], up["A"], up["B"]), Part(**parts[2]))


@pytest.mark.parametrize("activation", ACTS)
def test_the_formula_of_an_activation(activation):
    t = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    u = torch.randn_like(t).requires_grad_()
    act = reference.ACTIVATIONS[activation]
    torch.testing.assert_close(reference.gated(t, u, *act), ACTS[activation](t) * u)
    d = torch.randn_like(t)
    expected = torch.autograd.grad(ACTS[activation](t) * u, (t, u), d)
    for got, value in zip(reference.gated_backward(d, t, u, *act), expected, strict=True):
        torch.testing.assert_close(got, value)
    of_up, of_gate = reference.gated_factors(t, u, *act)
    torch.testing.assert_close((d * of_gate, d * of_up), expected)


def test_factors_are_finite_in_float16():
    gate, up = (torch.tensor([value], dtype=torch.float16) for value in (2.4, 6e4))
    value, of_gate = reference.gated_factors(gate, up, *reference.ACTIVATIONS["silu"])
    assert value.isfinite().all()
    assert of_gate.item() == 65504


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_saved_tensors_may_be_kept_elsewhere(device):
    """Copies of them have rows of their own."""
    x, parts = make_mlp(300, 64, 131, 72, (8, 8, 8), device, torch.bfloat16)
    dy = randn(300, 72, device=device, dtype=torch.bfloat16)
    expected = results(fused, x, parts, dy, "silu")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        got = results(fused, x, parts, dy, "silu")
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_gate_and_down_drop_by_different_masks():
    seed = torch.tensor(5)
    masks = [reference.keep_mask(64, 48, 0.5, seed + more) for more in (0, reference.DOWN_SEED)]
    rows = [{tuple(row) for row in mask.tolist()} for mask in masks]
    assert not rows[0] & rows[1], "not even in another order"


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("save", ["all", "less"])
def test_factors_of_different_dtypes(save, device, dtype):
    """No launch takes them together; each part still gets its kernels."""
    x, parts = make_mlp(300, 40, 56, 24, (8, 8, 8), device, dtype)
    parts[1] = {name: t.detach().float().requires_grad_() if name in "AB" else t for name, t in parts[1].items()}
    dy = randn(300, 24, device=device, dtype=dtype)
    got = results(fused, x, parts, dy, "silu", save=save)
    check(got, x, parts, dy, "silu")
