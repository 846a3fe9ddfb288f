"""`pytest bench --benchmark-only`: every way to train a LoRA linear, at every shape, forward and forward + backward.

All variants of a (shape, pass, mode) are measured together, interleaved, by the first of their tests; each test then
shows pytest-benchmark its own samples. On a GPU the table therefore holds device times, not launches.
"""

import functools
from dataclasses import asdict

import pytest
import torch

from . import record, timing
from .clock import CLOCK, show
from .measure import MEASURED, UNAVAILABLE, Measurements
from .shapes import PASSES, shapes_for
from .variants import PACKAGE, VARIANTS

DEVICE_TYPE = "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def measurements() -> Measurements:
    return Measurements()


def cases():
    """(shape, pass, mode, variant), a shape's cases in a row: only one shape is in memory at a time."""
    for shape in shapes_for(DEVICE_TYPE):
        for pass_name in PASSES:
            for mode in timing.modes(DEVICE_TYPE):
                for variant in VARIANTS:
                    yield pytest.param(shape, pass_name, mode, variant, id=f"{shape}-{pass_name}-{mode}-{variant}")


def extra_info(shape, pass_name: str, mode: str, variant: str) -> dict:
    """What pytest-benchmark's JSON keeps beside the samples, which it has already."""
    info = record.environment(measurements().device, measurements().dtype, measurements().rounds) | {
        "shape": asdict(shape)
    }
    info |= record.case(measurements(), shape, pass_name, mode, variant)
    info.pop("samples_us", None)
    if variant == PACKAGE:
        info["tiles"] = record.tiles(measurements(), shape)
    return info


# The libraries that are compared warn of their own affairs; that is worth seeing and no reason to stop.
@pytest.mark.filterwarnings("default")
@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize(("shape", "pass_name", "mode", "variant"), list(cases()))
def test_lora_linear(benchmark, shape, pass_name, mode, variant):
    obstacle = measurements().obstacle(shape)
    if obstacle:
        pytest.skip(obstacle)
    outcomes = measurements().outcomes(shape, pass_name, mode)
    outcome = outcomes[variant]
    if outcome.status == UNAVAILABLE:
        pytest.skip(outcome.reason)
    benchmark.group = f"{shape} {pass_name} {mode}"
    benchmark.extra_info.update(extra_info(shape, pass_name, mode, variant))
    if outcome.status != MEASURED:
        pytest.fail(f"{variant}: {outcome.reason}")
    show(benchmark, outcome.samples)
