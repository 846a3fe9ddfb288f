"""LoRA dropout: the update's input is masked and only that, forward and backward with the same mask."""

import pytest
import torch

from fused_lora import lora_linear, reference
from tests.ops.problem import DEVICES, PLACES, SCALE, make_dy, make_inputs, run, seed_on, solve

places = pytest.mark.parametrize(("device", "dtype"), PLACES)


@places
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 63 / 64])
def test_values_and_gradients(p, device, dtype):
    inputs = make_inputs(77, 101, 75, 5, device, dtype)
    solve(inputs, make_dy(inputs), p=p, seed=seed_on(device))


@places
def test_everything_dropped_leaves_the_base(device, dtype):
    inputs = make_inputs(45, 37, 29, 3, device, dtype)
    got = solve(inputs, make_dy(inputs), p=1.0, seed=seed_on(device))
    assert torch.count_nonzero(got["dA"]) == 0
    assert torch.count_nonzero(got["dB"]) == 0
    nothing = run(lora_linear, inputs, make_dy(inputs), scale=0.0)
    assert torch.equal(got["y"], nothing["y"])


@pytest.mark.parametrize("device", DEVICES)
def test_everything_dropped_gives_no_gradient_of_x_through_the_update(device):
    inputs = make_inputs(45, 37, 29, 3, device)
    inputs["weight"].zero_()
    got = run(lora_linear, inputs, make_dy(inputs), scale=SCALE, p=1.0, seed=seed_on(device))
    assert torch.count_nonzero(got["dx"]) == 0
    assert torch.equal(got["y"], inputs["bias"].expand_as(got["y"]))


@pytest.mark.parametrize("device", DEVICES)
def test_forward_and_backward_drop_the_same_entries(device):
    """With W = 0, A the identity and B = 1 the forward sums the kept entries and the gradient is their mask."""
    M, K, p = 50, 64, 0.3
    x = torch.ones(M, K, device=device, requires_grad=True)
    weight, A = torch.zeros(1, K, device=device), torch.eye(K, device=device)
    B = torch.ones(1, K, device=device)
    y = lora_linear(x, weight, A, B, scale=SCALE, p=p, seed=seed_on(device))
    y.sum().backward()
    mask = reference.keep_mask(M, K, p, seed_on(device))
    kept = SCALE / (1 - p)
    torch.testing.assert_close(x.grad, mask * kept)
    torch.testing.assert_close(y.detach(), mask.sum(1, keepdim=True) * kept)
    assert not mask.all()


def test_finite_differences():
    """The gradient along random directions, in float64 with the mask held by the seed."""
    inputs = make_inputs(9, 8, 7, 3, dtype=torch.float64)
    inputs["bias"].requires_grad_(False)
    dy, step = make_dy(inputs), 1e-6

    def loss(shift):
        moved = inputs | {name: inputs[name].detach() + shift * directions[name] for name in directions}
        return (lora_linear(**moved, scale=SCALE, p=0.4, seed=seed_on("cpu")) * dy).sum()

    got = run(lora_linear, inputs, dy, scale=SCALE, p=0.4, seed=seed_on("cpu"))
    for name in ("x", "A", "B"):
        directions = {name: torch.randn_like(inputs[name])}
        slope = (loss(step) - loss(-step)) / (2 * step)
        assert abs(slope - (directions[name] * got[f"d{name}"]).sum()) < 1e-7


@pytest.mark.parametrize("device", DEVICES)
def test_seeds(device):
    inputs = make_inputs(45, 37, 29, 3, device)

    def y(**options):
        return lora_linear(**inputs, scale=SCALE, p=0.5, **options)

    assert torch.equal(y(seed=seed_on(device)), y(seed=seed_on(device)))
    assert not torch.equal(y(seed=seed_on(device)), y(seed=seed_on(device, 1)))
    # Seeds that differ above the 32nd bit only.
    assert not torch.equal(y(seed=seed_on(device, 1)), y(seed=seed_on(device, 1 + 2**40)))
    assert not torch.equal(y(), y())
    torch.manual_seed(3)
    first = y()
    torch.manual_seed(3)
    assert torch.equal(first, y())


@pytest.mark.parametrize("device", DEVICES)
def test_without_dropout_the_generator_stays_where_it_was(device):
    inputs = make_inputs(5, 4, 3, 2, device)
    state = torch.get_rng_state()
    assert torch.equal(lora_linear(**inputs), lora_linear(**inputs, p=0.0, seed=seed_on(device)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions_count_as_rows(device):
    inputs = make_inputs((2, 3, 5), 37, 29, 3, device)
    flat = inputs | {"x": inputs["x"].reshape(30, 37)}
    options = dict(scale=SCALE, p=0.5, seed=seed_on(device))
    assert torch.equal(lora_linear(**inputs, **options).reshape(30, 29), lora_linear(**flat, **options))
