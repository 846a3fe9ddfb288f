"""ReLoRA's restart of layers: the function stays, the factors begin anew, and nothing is half done."""

import copy

import pytest
import torch

from fused_lora import lora_linear, reference
from fused_lora.ops import merge_and_reinit_
from tests.accuracy import assert_accurate
from tests.ops.layouts import every_other_column, transposed, view_of_a_cat
from tests.ops.problem import DEVICES, PLACES, SCALE, randn

SHAPES = [(75, 101, 5), (128, 64, 16), (1, 33, 1)]  # N, K, r


def make_layers(device="cpu", dtype=torch.bfloat16, lora_dtype=None, std=0.02):
    """merge_and_reinit_'s tensors by name."""
    lora_dtype = lora_dtype or dtype
    return {
        "weights": [randn(N, K, device=device, dtype=dtype, std=std) for N, K, _ in SHAPES],
        "As": [randn(r, K, device=device, dtype=lora_dtype, std=K**-0.5) for _, K, r in SHAPES],
        "Bs": [randn(N, r, device=device, dtype=lora_dtype, std=std) for N, _, r in SHAPES],
        "scales": [SCALE] * len(SHAPES),
        "seeds": [3, -5, 2**62],
    }


def zeros_beside(layers):
    return [torch.zeros(weight.shape, dtype=torch.int16, device=weight.device) for weight in layers["weights"]]


@pytest.mark.parametrize("lora_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_values(device, dtype, lora_dtype):
    layers = make_layers(device, dtype, lora_dtype)
    before = copy.deepcopy(layers)
    tensors = [t for name in ("weights", "As", "Bs") for t in layers[name]]
    pointers, versions = [t.data_ptr() for t in tensors], [t._version for t in tensors]
    merge_and_reinit_(**layers)
    assert pointers == [t.data_ptr() for t in tensors]
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True))
    for i, (_, K, r) in enumerate(SHAPES):
        weight, A, B = (before[name][i] for name in ("weights", "As", "Bs"))
        exact = weight.double() + SCALE * B.double() @ A.double()
        by_torch = weight + SCALE * B.to(dtype) @ A.to(dtype)
        assert_accurate("weight", layers["weights"][i], exact, by_torch)
        assert not layers["Bs"][i].any()
        seed = torch.tensor(layers["seeds"][i], device=device)
        assert torch.equal(layers["As"][i], reference.uniform(r, K, K**-0.5, seed).to(A.dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "lows"])
def test_the_function_stays_and_the_next_gradients_are_not_zero(rounding, device):
    layers = make_layers(device)
    options = {"lows": zeros_beside(layers)} if rounding == "lows" else {"rounding": rounding}
    xs = [randn(40, K, device=device, dtype=torch.bfloat16) for _, K, _ in SHAPES]

    def outputs():
        for name in ("As", "Bs"):
            layers[name] = [t.detach().requires_grad_() for t in layers[name]]
        rows = zip(xs, layers["weights"], layers["As"], layers["Bs"], strict=True)
        return [lora_linear(x, weight, A, B, scale=SCALE) for x, weight, A, B in rows]

    before = outputs()
    merge_and_reinit_(**layers, **options)
    after = outputs()
    for old, new in zip(before, after, strict=True):
        assert (old - new).float().norm() < 0.01 * old.float().norm()
    sum(y.float().square().sum() for y in after).backward()
    assert all(B.grad.any() for B in layers["Bs"])
    assert not any(A.grad.any() for A in layers["As"]), "B is zero"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_with_lows_nothing_is_lost(dtype, device):
    layers = make_layers(device, dtype, torch.float32)
    lows = zeros_beside(layers)
    exact = [weight.double() for weight in layers["weights"]]
    first = [value.clone() for value in exact]
    for cycle in range(20):
        layers["seeds"] = [cycle, cycle + 100, cycle + 200]
        for i, (N, _, r) in enumerate(SHAPES):
            layers["Bs"][i].copy_(randn(N, r, device=device, dtype=torch.float32, std=2e-5))
            exact[i] += SCALE * layers["Bs"][i].double() @ layers["As"][i].double()
        merge_and_reinit_(**layers, lows=lows)
    for i, weight in enumerate(layers["weights"]):
        reached = reference.join(weight, lows[i]).double()
        assert (reached - exact[i]).norm() < 1e-3 * (exact[i] - first[i]).norm()


@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_follows_its_seeds(device):
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        layers = make_layers(device) | {"seeds": [seed] * len(SHAPES)}
        merge_and_reinit_(**layers, rounding="stochastic")
        results.append(layers["weights"][0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [transposed, every_other_column, view_of_a_cat])
def test_layouts(layout, device):
    layers, strided = make_layers(device), {}
    for name in ("weights", "As", "Bs"):
        strided[name] = [layout(t) for t in layers[name]]
    merge_and_reinit_(**layers)
    merge_and_reinit_(**strided, scales=layers["scales"], seeds=layers["seeds"])
    for name, tensors in strided.items():
        assert all(torch.equal(got, want) for got, want in zip(tensors, layers[name], strict=True))


def test_a_failure_half_way_says_how_far_it_came(monkeypatch):
    layers = make_layers()
    before, real = copy.deepcopy(layers), reference.uniform

    def scarce(rows, *arguments):
        if rows == SHAPES[1][2]:
            raise torch.OutOfMemoryError("no memory")
        return real(rows, *arguments)

    monkeypatch.setattr(reference, "uniform", scarce)
    with pytest.raises(RuntimeError, match="of 3 layers only 0 restarted, and all compute what they did: no memory"):
        merge_and_reinit_(**layers)
    for name in ("weights", "As", "Bs"):
        assert not torch.equal(layers[name][0], before[name][0])
        assert all(torch.equal(layers[name][i], before[name][i]) for i in (1, 2))


@pytest.mark.gpu
def test_a_kernel_that_cannot_be_made_changes_nothing(monkeypatch):
    from fused_lora.kernels import launch, restart

    for half in ("young", "old"):  # where nothing is compiled yet
        monkeypatch.setattr(launch._plans, half, {})
    layers = make_layers("cuda")
    before = copy.deepcopy(layers)

    def refuse(*arguments, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(restart.reinit_kernel, "warmup", refuse)
    with pytest.raises(RuntimeError, match="of 3 layers none restarted, and all compute what they did: no memory"):
        merge_and_reinit_(**layers)
    for name in ("weights", "As", "Bs"):
        assert all(torch.equal(new, old) for new, old in zip(layers[name], before[name], strict=True))


def wrong(name, i, value):
    def change(layers):
        layers[name][i] = value(layers[name][i])

    return change


@pytest.mark.parametrize(("change", "error", "words"), [
    (lambda layers: layers["As"].pop(), ValueError, "As must have an entry for each of the 3 weights, got 2"),
    (lambda layers: layers.update(rounding="up"), ValueError, "rounding must be nearest or stochastic, got 'up'"),
    (wrong("As", 2, lambda A: A[:, 1:]), ValueError, r"layer 2: A must have shape \(r, 33\)"),
    (wrong("Bs", 1, lambda B: B[0].expand(128, 16)), ValueError, "layer 1: B must be writable"),
    (wrong("scales", 1, lambda scale: float("nan")), ValueError, "layer 1: scale must be finite"),
    (wrong("seeds", 1, lambda seed: 0.5), TypeError, "layer 1: seed must be an int"),
    (wrong("seeds", 1, lambda seed: 2**63), ValueError, "layer 1: seed must fit into 64 bits"),
    (wrong("lows", 0, lambda low: low.int()), TypeError, "layer 0: low must be int16 beside a 16-bit weight"),
    (wrong("lows", 2, lambda low: low.T), ValueError, r"layer 2: low must have weight's shape \(1, 33\)"),
    (lambda layers: layers["lows"].pop(), ValueError, "lows must have an entry for each"),
    (lambda layers: [layers[name].append(layers[name][0]) for name in layers], ValueError,
     "layer 3: weight must be a tensor of its own, got layer 0's weight"),
])  # fmt: skip
def test_wrong_arguments_change_nothing(change, error, words):
    layers = make_layers()
    layers["lows"] = zeros_beside(layers)
    tensors = {name: list(layers[name]) for name in ("weights", "As", "Bs", "lows")}
    before = copy.deepcopy(tensors)
    change(layers)
    with pytest.raises(error, match=words):
        merge_and_reinit_(**layers)
    for name, values in tensors.items():
        assert all(torch.equal(value, old) for value, old in zip(values, before[name], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stochastic_rounding_is_of_16_bits(dtype):
    """Wider weights round to the nearest whatever is asked."""
    results = []
    for rounding in ("nearest", "stochastic"):
        torch.manual_seed(0)
        layers = make_layers(dtype=dtype)
        merge_and_reinit_(**layers, rounding=rounding)
        results.append(layers["weights"])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_lows_of_some_layers_are_refused():
    layers = make_layers()
    with pytest.raises(ValueError, match="lows must have a tensor for every layer"):
        merge_and_reinit_(**layers, lows=[zeros_beside(layers)[0], None, None])


def test_no_layers_are_nothing_to_do():
    merge_and_reinit_([], [], [], [], [])
