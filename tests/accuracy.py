"""The tolerance that can fail: a result is held to what torch itself reaches by the same formula in the same dtype."""

import torch

# Below this many elements the means of two sets of rounding errors differ by chance.
ENOUGH_FOR_MEANS = 1000
TINY = {torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float32: 1e-6, torch.float64: 1e-14}


def assert_accurate(name, got, exact, torch_result, roundings=0, rounded_to=None):
    """|got - exact| against |torch_result - exact|, exact in float64.

    Largest error at most twice torch's, or what so many roundings (to the result's dtype, if not to another) may cost
    the largest entry, which of few entries may have torch's luck against it; mean error at most 1.2 times torch's, and
    the mean signed errors small: a cast that truncates passes the first rule alone. The slack is TINY of the exact
    result's size; a NaN fails everything.
    """
    slack = TINY[torch_result.dtype] * max(exact.abs().max().item(), 1e-30) if exact.numel() else 0.0
    got_error, torch_error = got.double() - exact, torch_result.double() - exact
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    rounded = roundings * torch.finfo(rounded_to or torch_result.dtype).eps / 2 * exact.abs().max().item()
    largest, allowed = got_error.abs().max().item(), max(2 * torch_error.abs().max().item(), rounded) + slack
    assert largest <= allowed, f"{name}: largest error {largest:.3e}, allowed {allowed:.3e}"
    if exact.numel() < ENOUGH_FOR_MEANS:
        return
    mean, allowed = got_error.abs().mean().item(), 1.2 * torch_error.abs().mean().item() + slack
    assert mean <= allowed, f"{name}: mean error {mean:.3e}, allowed {allowed:.3e}"
    # The mean of n rounding errors is about their size / sqrt(n); a truncating cast leaves half a unit of each value's
    # sign instead, and what is added once too often a constant.
    allowed = (0.25 + 4 / exact.numel() ** 0.5) * torch_error.abs().mean().item() + slack
    for kind, signs in (("outward", exact.sign()), ("upward", torch.ones_like(exact))):
        bias = abs((got_error * signs).mean().item())
        assert bias <= allowed, f"{name}: {kind} bias {bias:.3e}, allowed {allowed:.3e}"
