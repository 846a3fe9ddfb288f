"""Second and forward-mode derivatives, torch.func and tracers: as plain torch's, and never zeros."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F

from fused_lora import LoRALinear, lora_linear
from fused_lora.ops import Part, lora_group, lora_mlp
from fused_lora.reference import lora_linear_ref, lora_mlp_ref
from tests.ops.problem import DEVICES, SCALE, make_inputs, seed_on

WANTED = ("x", "A", "B", "bias")
# On a GPU in float64, which is plain torch's, and in bfloat16, which is the kernels'.
PLACES = [
    pytest.param("cpu", torch.float64, id="cpu"),
    pytest.param("cuda", torch.float64, id="cuda-float64", marks=pytest.mark.gpu),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=pytest.mark.gpu),
]


def close(got, want):
    tolerance = {"rtol": 4e-2, "atol": 4e-2 * want.abs().max().item()} if want.dtype is torch.bfloat16 else {}
    torch.testing.assert_close(got, want, **tolerance)


def nonlinear(y):
    return y.sigmoid().mul(y).sum()


def some(device, dtype, M=6, p=0.0):
    inputs = make_inputs(M, 16, 24, 4, device, dtype)
    scale = torch.tensor(SCALE, device=device, dtype=torch.promote_types(dtype, torch.float32))
    return inputs, {"scale": scale} | ({"p": p, "seed": seed_on(device)} if p else {})


def second(function, inputs, **options):
    """The gradient of the squares of the first gradients."""
    wanted = [inputs[name] for name in WANTED]
    grads = torch.autograd.grad(nonlinear(function(**inputs, **options)), wanted, create_graph=True)
    return torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives(p, device, dtype):
    inputs, options = some(device, dtype, p=p)
    for got, want in zip(
        second(lora_linear, inputs, **options), second(lora_linear_ref, inputs, **options), strict=True
    ):
        close(got, want)


@pytest.mark.parametrize("frozen", WANTED)
def test_second_derivatives_of_what_is_wanted(frozen):
    inputs, options = some("cpu", torch.float64)
    inputs[frozen] = inputs[frozen].detach()
    wanted = [t for t in inputs.values() if t.requires_grad]
    firsts = [
        torch.autograd.grad(nonlinear(function(**inputs, **options)), wanted, create_graph=True)
        for function in (lora_linear, lora_linear_ref)
    ]
    seconds = [torch.autograd.grad(sum(grad.square().sum() for grad in grads), wanted) for grads in firsts]
    for got, want in zip(*seconds, strict=True):
        close(got, want)


def test_one_input_made_from_another():
    """Its share comes through itself, once."""
    inputs, options = some("cpu", torch.float64)

    def of(function):
        made = inputs | {"A": inputs["A"] * inputs["x"].mean(), "x": inputs["x"] * 2}
        (first,) = torch.autograd.grad(nonlinear(function(**made, **options)), inputs["x"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), inputs["x"])[0]

    close(of(lora_linear), of(lora_linear_ref))


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("tool", ["hessian", "hvp", "jvp", "vhp", "jacobian", "hessian at once", "jacobian at once"])
def test_functional(tool, device, dtype):
    inputs, options = some(device, dtype, M=2)
    v = torch.randn_like(inputs["x"])
    tool, at_once = tool.removesuffix(" at once"), tool.endswith("at once")
    more = () if tool in ("hessian", "jacobian") else (v,)

    def of(function):
        return getattr(torch.autograd.functional, tool)(
            lambda x: nonlinear(function(**inputs | {"x": x}, **options)), inputs["x"], *more,
            **({"vectorize": True} if at_once else {}),
        )  # fmt: skip

    got, want = of(lora_linear), of(lora_linear_ref)
    for one, other in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
        assert other.abs().max() > 0
        close(one, other)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("moved", WANTED)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode(grad, moved, device, dtype):
    inputs, options = some(device, dtype)
    tangent = torch.randn_like(inputs[moved])

    def of(function):
        with forward_ad.dual_level(), torch.set_grad_enabled(grad):
            dual = forward_ad.make_dual(inputs[moved].detach(), tangent)
            return forward_ad.unpack_dual(function(**inputs | {moved: dual}, **options)).tangent

    got, want = of(lora_linear), of(lora_linear_ref)
    assert got is not None
    close(got, want)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("moved", ["x", "A"])
@pytest.mark.parametrize("transform", ["grad", "jacfwd", "jacrev", "hessian", "vmap", "vmap of grad"])
def test_transformations(transform, moved, device, dtype):
    inputs, options = some(device, dtype)
    inputs = {name: t.detach() for name, t in inputs.items()}

    def of(function):
        def loss(value):
            return nonlinear(function(**inputs | {moved: value}, **options))

        value = inputs[moved]
        if transform.startswith("vmap"):
            inner = loss if transform == "vmap" else torch.func.grad(loss)
            return torch.func.vmap(inner)(torch.stack([value, 2 * value, value - 1]))
        return getattr(torch.func, transform)(loss)(value)

    close(of(lora_linear), of(lora_linear_ref))


@pytest.mark.parametrize("at_once", [torch.func.vmap, torch._vmap_internals._vmap])
def test_the_backward_pass_that_csrc_asks_for_takes_many_gradients(at_once):
    inputs, options = some("cpu", torch.float64)
    y, wanted = lora_linear_ref(**inputs, **options), [inputs[name] for name in WANTED]
    part = [*list(inputs.values())[1:], options["scale"], None, None, None, None]
    dys = torch.randn(3, *y.shape, dtype=y.dtype)
    again = torch.ops.fused_lora.lora_again
    got = at_once(lambda dy: tuple(again([dy], inputs["x"], part, 0.0, [], True, [True] * 3 + [False])))(dys)
    for one, other in zip(got[:4], torch.autograd.grad(y, wanted, dys, is_grads_batched=True), strict=True):
        close(one, other)


TRANSFORMS = {
    "grad": torch.func.grad, "jacfwd": torch.func.jacfwd, "jacrev": torch.func.jacrev, "hessian": torch.func.hessian,
    "vmap": torch.func.vmap, "vmap of grad": lambda loss: torch.func.vmap(torch.func.grad(loss)),
    "jvp": lambda loss: lambda x: torch.func.jvp(loss, (x,), (torch.ones_like(x),))[1],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transformations_inside_compiled_code(transform):
    torch._dynamo.reset()
    inputs, options = some("cpu", torch.float64)
    inputs = {name: t.detach() for name, t in inputs.items()}
    x = torch.stack([inputs["x"]] * 2) if "vmap" in transform else inputs["x"]

    def of(function):
        return TRANSFORMS[transform](lambda x: nonlinear(function(**inputs | {"x": x}, **options)))

    close(torch.compile(of(lora_linear), backend="aot_eager", fullgraph=True)(x), of(lora_linear_ref)(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_forward_mode_of_compiled_code():
    torch._dynamo.reset()
    inputs, options = some("cpu", torch.float64)
    inputs = {name: t.detach() for name, t in inputs.items()}
    compiled = torch.compile(lambda x: lora_linear(**inputs | {"x": x}, **options), backend="aot_eager")
    compiled(inputs["x"])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs["x"], torch.ones_like(inputs["x"]))
        got = forward_ad.unpack_dual(compiled(dual)).tangent
        close(got, forward_ad.unpack_dual(lora_linear_ref(**inputs | {"x": dual}, **options)).tangent)


def test_autocast_around_a_backward_pass_alone():
    """It is differentiated in the precision of its forward."""
    inputs, options = some("cpu", torch.float32)

    def of(function, autocast):
        y = nonlinear(function(**inputs, **options))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            (first,) = torch.autograd.grad(y, inputs["x"], create_graph=True)
        return first

    close(of(lora_linear, True), of(lora_linear_ref, False))


def test_gradcheck_of_everything():
    """Batched, forward-mode and undefined gradients, and second derivatives, with dropout."""
    x, parts = three_parts("cpu", torch.float64)
    names = [[name for name, t in part.items() if t.requires_grad] for part in parts]
    seed = seed_on("cpu")

    def made(tensors):
        rest = iter(tensors)
        return [Part(**part | {name: next(rest) for name in own}) for part, own in zip(parts, names, strict=True)]

    def group(x, *tensors):
        return lora_group(x, made(tensors)[:2], 0.3, seed)

    def mlp(x, *tensors):
        return lora_mlp(x, *made(tensors), p=0.3, seed=seed)

    tensors = [part[name] for part, own in zip(parts, names, strict=True) for name in own]
    for function in (group, mlp):
        of = lambda x, A, function=function: function(x, A, *tensors[1:])  # noqa: E731
        options = {"check_batched_grad": True}
        assert torch.autograd.gradcheck(of, (x, tensors[0]), check_forward_ad=True, **options)
        assert torch.autograd.gradgradcheck(of, (x, tensors[0]), **options)


def three_parts(device, dtype):
    x, *_ = make_inputs(6, 16, 24, 4, device, dtype).values()
    parts = []
    for K, N, r in ((16, 24, 4), (16, 24, 2), (24, 8, 3)):
        part = make_inputs(1, K, N, r, device, dtype)
        del part["x"]
        parts.append(part)
    return x, parts


def gradients(y, tensors, create_graph=False):
    return torch.autograd.grad(y, tensors, create_graph=create_graph, materialize_grads=True)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("save", ["all", "less"])
def test_mlps_and_groups(save, device, dtype):
    x, parts = three_parts(device, dtype)
    tensors = [x, *(t for part in parts for t in part.values() if t.requires_grad)]
    scaled = [part | {"scale": torch.tensor(SCALE, device=device)} for part in parts]

    def fused():
        q, k = lora_group(x, [Part(**part) for part in scaled[:2]])
        return nonlinear(q) + nonlinear(k) + nonlinear(lora_mlp(x, *(Part(**part) for part in scaled), save=save))

    def plain():
        q, k = (lora_linear_ref(x, **part) for part in scaled[:2])
        return nonlinear(q) + nonlinear(k) + nonlinear(lora_mlp_ref(x, *scaled, F.silu))

    found = []
    for function in (fused, plain):
        first = gradients(function(), tensors, create_graph=True)
        found.append(gradients(sum(grad.square().sum() for grad in first), tensors))
    for got, want in zip(*found, strict=True):
        close(got, want)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        close(*(forward_ad.unpack_dual(function()).tangent for function in (fused, plain)))


@pytest.mark.parametrize("device", DEVICES)
def test_what_follows_in_place(device):
    """y is no view, which could not be changed behind a Function."""
    inputs = make_inputs((2, 3), 16, 24, 4, device)
    for p in (0.0, 0.3):
        torch.relu_(lora_linear(**inputs, scale=SCALE, p=p, seed=seed_on(device))).sum().backward()
        y = lora_linear(**inputs, scale=SCALE, p=p, seed=seed_on(device))
        y += 1
        y.sum().backward()
    ys = lora_group(inputs["x"], [Part(*list(inputs.values())[1:])] * 2)
    sum(y.mul_(2).sum() for y in ys).backward()
    x, parts = three_parts(device, torch.float32)
    with torch.no_grad():
        assert lora_linear(**inputs)._base is None
        assert lora_mlp(x[None], *(Part(**part) for part in parts))._base is None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_jit_trace(device):
    inputs, options = some(device, torch.float32)
    fixed = {name: t.detach() for name, t in inputs.items() if name != "x"}
    traced = torch.jit.trace(lambda x: lora_linear(x, **fixed, **options), inputs["x"].detach())
    x = torch.randn(9, 16, device=device)
    torch.testing.assert_close(traced(x), lora_linear(x, **fixed, **options))
    assert "fused_lora::" not in str(traced.graph)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_an_exported_program_is_plain_torch(grad, strict):
    x, parts = three_parts("cpu", torch.float32)
    parts = [{name: t.detach() for name, t in part.items()} for part in parts]

    class Both(torch.nn.Module):
        def forward(self, x):
            q, k = lora_group(x, [Part(**part) for part in parts[:2]])
            return q * k + lora_mlp(x, *(Part(**part) for part in parts)).sum()

    with torch.set_grad_enabled(grad):
        program = torch.export.export(Both(), (x.detach().requires_grad_(grad),), strict=strict)
    assert "fused_lora" not in str(program.graph)
    close(program.module()(x), Both()(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    layer = torch.nn.Sequential(LoRALinear(16, 24, 4, lora_alpha=6))
    torch.nn.init.normal_(layer[0].lora_B)
    x = torch.randn(5, 16)
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=dynamo)
    program = onnx.load(tmp_path / "layer.onnx")
    (got,) = ReferenceEvaluator(program).run(None, {program.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.tensor(got), layer(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_flops_are_counted(compiled, device):
    from torch.utils.flop_counter import FlopCounterMode

    inputs = make_inputs(6, 16, 24, 4, device)
    function = torch.compile(lora_linear, backend="aot_eager") if compiled else lora_linear
    M, K, N, r = 6, 16, 24, 4
    with FlopCounterMode(display=False) as forward:
        y = function(**inputs, scale=torch.tensor(SCALE, device=device))
    assert forward.get_total_flops() == 2 * M * (K * N + r * (K + N))
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * M * (K * N + 2 * r * (K + N))
